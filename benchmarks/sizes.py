"""Table of the sizes of exported files relative to their plan, and of the cost of opening them.

    python benchmarks/sizes.py --widths 8 4 2 --out benchmarks/results/sizes.json

The bytes of a plan are weights at their width, and all other parameters and the scales in 32 bits.
timm's models have random weights and random biases, since a file stores equal biases only once.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch
from results import write_results
from torch import Tensor, nn

import fxquant
from fxquant import policies
from fxquant.backends.onnx_qdq import TARGETS
from fxquant.demo import models
from fxquant.demo.glyphs import GlyphDataset

SESSION = Path(__file__).parent / "session.py"


def load(name: str) -> tuple[nn.Module, Tensor]:
    """The model of a name, trained if it is one of the demo's, and four images."""
    if name in models.NAMES:
        data = GlyphDataset("calib", 4)
        return models.build(name), torch.stack([data[i][0] for i in range(4)])
    model = timm.create_model(name).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter, std=0.02)
    return model, torch.randn(4, *model.pretrained_cfg["input_size"])


def main() -> None:
    """Prints the table as Markdown, row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [*models.NAMES, "deit_small_patch16_224"]
    parser.add_argument("--models", nargs="+", default=names, help="demo or timm models")
    parser.add_argument("--widths", type=int, nargs="+", default=list(range(8, 1, -1)))
    parser.add_argument("--target", choices=sorted(TARGETS), default="x86-avx2")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the figures as JSON")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    torch.manual_seed(0)
    print(
        "| model | weights | plan kB | file kB | file / plan | kernels | to open: s | MB | after |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.models:
        model, images = load(name)
        for bits in options.widths:
            compiled = fxquant.compile(model, [images], policies.minmax(bits, 8))
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.onnx"
                exported = compiled.export_onnx(path, target=options.target)
                cost = subprocess.run(
                    [sys.executable, str(SESSION), str(path)],
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout.split()
            plan = compiled.report.quantized_bytes
            row = {"model": name, "bits": bits, "plan_bytes": plan}
            row |= {"file_bytes": exported.file_bytes, "kernels": sum(exported.fused.values())}
            opening = zip(("open_seconds", "open_mb", "open_mb_after"), cost, strict=True)
            rows.append(row | {key: float(value.replace(",", "")) for key, value in opening})
            print(
                f"| {name} | {bits} bits | {plan / 1e3:,.0f} | {exported.file_bytes / 1e3:,.0f} "
                f"| {exported.file_bytes / plan:.3f} | {sum(exported.fused.values())} "
                f"| {' | '.join(cost)} |",
                flush=True,
            )
    if options.out is not None:
        write_results(options.out, "sizes", vars(options), rows)


if __name__ == "__main__":
    main()
