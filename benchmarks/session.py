"""Cost of opening an ONNX file in onnxruntime: seconds, peak megabytes, and megabytes after.

    python benchmarks/session.py model.onnx

The script prints one number per column. Memory is that of the process minus its memory before; the
memory "after" is measured once the C library has returned free memory to the system.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from pathlib import Path

import onnxruntime as ort


def memory(kind: str) -> float:
    """Megabytes of this process: ``VmRSS`` at present, ``VmHWM`` at its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(kind))
    return int(line.split()[1]) / 1e3


def main() -> None:
    """Opens the file of the command line, and prints the cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="ONNX file")
    file = parser.parse_args().file
    if not file.is_file():
        parser.error(f"no file {file}; export_onnx or `fxquant compile` writes one")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    before, start = memory("VmRSS"), time.perf_counter()
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    seconds, most = time.perf_counter() - start, memory("VmHWM")
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    assert session.get_inputs()
    print(f"{seconds:.2f} {most - before:.0f} {memory('VmRSS') - before:.0f}")


if __name__ == "__main__":
    main()
