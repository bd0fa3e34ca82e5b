"""Top-1 of the shipped models after quantization, simulated, over calibration draws.

python benchmarks/accuracy.py --models glyph_vit glyph_swin --images 950 --draws 2
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxquant
from fxquant import Policy, policies
from fxquant.demo.glyphs import GlyphDataset
from fxquant.demo.models import NAMES, build

WIDTHS = (8, 6, 5, 4, 3)


def load(split: str, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Images ``(count, 3, 64, 64)`` and labels ``(count,)`` of a split, from ``start`` on."""
    data = GlyphDataset(split, start + count)
    images, labels = zip(*(data[i] for i in range(start, start + count)), strict=True)
    return torch.stack(images), torch.tensor(labels)


@torch.no_grad()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent."""
    found = torch.cat([model(part).argmax(1) for part in images.split(50)])
    return 100 * float((found == labels).float().mean())


def recipes() -> list[Policy]:
    """The policies compared."""
    return [policies.w8a8(), *(policies.minmax(bits, bits) for bits in WIDTHS)]


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--images", type=int, default=950, help="test images")
    parser.add_argument("--calibration", type=int, default=32, help="images of one draw")
    parser.add_argument("--draws", type=int, default=2, help="calibration draws")
    options = parser.parse_args()
    test = load("test", 0, options.images)
    table = Table("model", "policy", "top-1 % (mean)", "spread", "lost")
    for name in options.models:
        model = build(name)
        exact = top1(model, *test)
        table.add_row(name, "float32", f"{exact:.1f}", "", "")
        for policy in recipes():
            scores = []
            for draw in range(options.draws):
                images, _ = load("calib", draw * options.calibration, options.calibration)
                compiled = fxquant.compile(model, images.split(16), policy)
                scores.append(top1(compiled, *test))
            mean, spread = np.mean(scores), np.max(scores) - np.min(scores)
            row = [f"{mean:.1f}", f"{spread:.1f}", f"{exact - mean:.1f}"]
            table.add_row(name, policy.name, *row)
    Console().print(table)


if __name__ == "__main__":
    main()
