"""Latency in onnxruntime: float32, onnxruntime's own quantize_static, and fxquant, in one run.

    python benchmarks/latency.py --batches 1 8 --out benchmarks/results/latency.json

All sessions are timed in turn, round by round: a noisy machine slows all sessions equally. Compare
the ratios. Weights are random: latency does not depend on weights. `x86-vnni` and `quantize_static`
have int8 weights, which CPUs without VNNI multiply wrongly (the line above the table shows whether
this CPU does); `x86-avx2` and `quantize_static uint8` have uint8 weights, which are exact on every
CPU. With `--forms`, other forms of the 8-bit attention follow, for the target `x86-vnni`: softmax
as one operation, twin uniform, or float in front of its product, where `w8a8` divides it behind the
product; and rotation behind GELU, with the twins that is `best` where outlying channels are found.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import timm
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quant_pre_process,
    quantize_static,
)
from results import write_results
from rich.console import Console
from rich.table import Table

import fxquant
from fxquant import policies
from fxquant.backends.onnx_qdq import TARGETS, make_session
from fxquant.backends.onnx_qdq.target import u8s8_saturates
from fxquant.config.spec import Scheme, TensorSpec
from fxquant.policies.policy import Rule

_W8A8 = policies.w8a8()
_TWIN = TensorSpec(bits=8, scheme=Scheme.TWIN_UNIFORM)
_ROTATED = replace(_W8A8, rotate_hidden=True)
FORMS = {
    "softmax in one": replace(_W8A8, defer_softmax=False),
    "softmax twin": _W8A8.with_rules(Rule(fed_by="softmax", spec=_TWIN)),
    "softmax float": _W8A8.with_rules(Rule(fed_by="softmax", spec=None)),
    "hidden rotated": _ROTATED,
    "hidden rotated, softmax twin": _ROTATED.with_rules(Rule(fed_by="softmax", spec=_TWIN)),
}


class Reader(CalibrationDataReader):
    """Calibration images for quantize_static, one batch at a time."""

    def __init__(self, images: np.ndarray) -> None:
        self._batches: Iterator[dict[str, np.ndarray]] = iter(
            [{"images": images[i : i + 4]} for i in range(0, len(images), 4)]
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, None at the end."""
        return next(self._batches, None)


def export_float(model: torch.nn.Module, images: torch.Tensor, path: Path) -> None:
    """Writes the float32 model with PyTorch's exporter."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (images[:2],),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["images"],
            opset_version=21,
            verbose=False,
        )
        program.model.ir_version = 10
        program.save(path)


def quantize_with_onnxruntime(
    float_path: Path, images: np.ndarray, path: Path, weight_type: QuantType
) -> None:
    """Writes onnxruntime's own QDQ file: uint8 activations, weights per channel."""
    logging.getLogger().setLevel(logging.ERROR)  # hides warnings of each LayerNorm weight's rank
    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(float_path), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(path),
        Reader(images),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=weight_type,
    )


def time_sessions(
    sessions: dict[str, ort.InferenceSession], images: np.ndarray, rounds: int
) -> dict[str, float]:
    """Median milliseconds per run of each session, timed in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for i in range(rounds + 2):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, {session.get_inputs()[0].name: images})
            if i >= 2:  # the first rounds warm caches up
                seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) * 1e3 for name, values in seconds.items()}


def main() -> None:
    """Runs the comparison and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--images", type=int, default=32, help="calibration images")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--forms", action="store_true", help="also time other forms of 8 bits")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the figures as JSON")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    model = timm.create_model(options.model).eval()
    images = torch.randn(options.images, *model.pretrained_cfg["input_size"])
    compiled = fxquant.compile(model, images.split(8), "w8a8")
    with tempfile.TemporaryDirectory() as folder:
        paths = {"float32": Path(folder) / "float32.onnx"}
        export_float(model, images, paths["float32"])
        kinds = {"quantize_static": QuantType.QInt8, "quantize_static uint8": QuantType.QUInt8}
        for name, kind in kinds.items():
            paths[name] = Path(folder) / f"{name.replace(' ', '_')}.onnx"
            quantize_with_onnxruntime(paths["float32"], images.numpy(), paths[name], kind)
        for target in TARGETS:
            paths[f"fxquant {target}"] = Path(folder) / f"{target}.onnx"
            print(compiled.export_onnx(paths[f"fxquant {target}"], target=target))
        for name, policy in FORMS.items() if options.forms else ():
            paths[name] = Path(folder) / f"{name}.onnx"
            form = fxquant.compile(model, images[:8].split(8), policy)
            form.export_onnx(paths[name], target="x86-vnni")
        sessions = {name: make_session(path, options.threads) for name, path in paths.items()}
        table = Table("batch", "runtime", "ms", "float32 / this", "quantize_static / this")
        for batch in options.batches:
            data = images[:1].expand(batch, *images.shape[1:]).contiguous().numpy()
            times = time_sessions(sessions, data, options.rounds)
            for name, ms in times.items():
                ratios = [f"{times[peer] / ms:.2f}" for peer in ("float32", "quantize_static")]
                table.add_row(str(batch), name, f"{ms:.1f}", *ratios)
                rows.append({"batch": batch, "runtime": name, "milliseconds": ms})
    print(f"{options.model}, {options.threads} threads, onnxruntime {ort.__version__}")
    print(f"uint8 x int8 products overflow on this CPU: {'yes' if u8s8_saturates() else 'no'}")
    Console().print(table)
    if options.out is not None:
        write_results(options.out, "latency", vars(options), rows, options.threads)


if __name__ == "__main__":
    main()
