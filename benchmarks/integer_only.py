"""Fully quantized W8A8: top-1 of the shipped models, simulated and on the integer-only executor.

    python benchmarks/integer_only.py

Each draw calibrates on different images. ``products`` is ``policies.w8a8()``, whose norms, softmax,
activation functions and additions stay float; ``full`` is ``policies.w8a8(full=True)``, simulated;
``executor`` is ``full`` lowered to integers only; ``agreement`` is the share of images for which
``full`` and ``executor`` choose the same class. Each draw checks on one image that no float is
computed between the first and the last code, and on some images that products in integers equal
the faster products carried by floats, which all other images use.
"""

from __future__ import annotations

import argparse

import torch
from accuracy import load, positive
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxquant
from fxquant import policies
from fxquant.backends.integer import float_operations
from fxquant.demo.models import NAMES, build
from fxquant.utils.progress import track

_COMPARED = 8  # images on which the two carriers of products are compared


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Classes ``(N,)`` of images ``(N, …)``."""
    return torch.cat([model(part).argmax(1) for part in images.split(50)])


def percent(hits: Tensor) -> float:
    """Share of ``hits`` ``(N,)`` that are true, in percent."""
    return 100 * float(hits.float().mean())


def measure(name: str, draw: int, options: argparse.Namespace) -> list[float]:
    """Top-1 of ``products``, ``full`` and ``executor`` and the agreement, in percent.

    Raises:
        RuntimeError: the executor computes in float, or its two carriers differ.
    """
    calibration, _ = load("calib", draw * options.calibration, options.calibration)
    images, labels = load("test", 0, options.images)
    products = fxquant.compile(build(name), calibration.split(16), policies.w8a8())
    full = fxquant.compile(build(name), calibration.split(16), policies.w8a8(full=True))
    whole = full.lower("integer", integer_only=True)
    found = float_operations(whole, images[:1])
    if found:
        raise RuntimeError(f"{name}: {len(found)} float operations, {found[0]} first")
    fast = full.lower("integer", integer_only=True, float_products=True)
    with torch.no_grad():
        if not torch.equal(whole(images[:_COMPARED]), fast(images[:_COMPARED])):
            raise RuntimeError(f"{name}: the two carriers of products differ")
    simulated, executed = predict(full, images), predict(fast, images)
    right = (predict(products, images) == labels, simulated == labels, executed == labels)
    return [percent(hits) for hits in (*right, simulated == executed)]


def main() -> None:
    """Prints a row per model and draw, and the mean of each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--images", type=positive, default=950, help="test images")
    parser.add_argument("--calibration", type=positive, default=32, help="images of one draw")
    parser.add_argument("--draws", type=positive, default=5, help="calibration draws")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("model", "draw", "float32", "products", "full", "executor", "agreement")
    for name in options.models:
        images, labels = load("test", 0, options.images)
        exact = percent(predict(build(name), images) == labels)
        rows = []
        for draw in track(range(options.draws), label=name, total=options.draws):
            rows.append(measure(name, draw, options))
            table.add_row(name, str(draw), f"{exact:.2f}", *(f"{x:.2f}" for x in rows[-1]))
        means = torch.tensor(rows).mean(0).tolist()
        table.add_row(name, "mean", f"{exact:.2f}", *(f"{x:.2f}" for x in means), end_section=True)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
