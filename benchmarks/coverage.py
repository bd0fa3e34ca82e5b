"""Table of the quantized edges of each model family, and of their kernels in onnxruntime.

    python benchmarks/coverage.py

The models are the small configurations of the coverage test, with random weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

import fxquant

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.helpers.zoo import FAMILIES


def main() -> None:
    """Prints the table as Markdown, row by row."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    print("| model | products | edges quantized | integer kernels | float, and why |")
    print("|---|---|---|---|---|")
    for family in FAMILIES:
        images = torch.randn(4, *family.image, generator=torch.Generator().manual_seed(1))
        compiled = fxquant.compile(family.model(), [images], "w8a8")
        with tempfile.TemporaryDirectory() as folder:
            exported = compiled.export_onnx(Path(folder) / "model.onnx")
        quantized = len(compiled.plan) - len(compiled.report.left_float)
        reasons = sorted({item.reason for item in exported.unfused})
        left = f"{len(exported.unfused)}: {'; '.join(reasons)}" if reasons else "none"
        print(
            f"| {family.name} | {len(compiled.plan) // 2} | {quantized} of {len(compiled.plan)} "
            f"| {sum(exported.fused.values())} | {left} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
