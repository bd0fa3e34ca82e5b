"""Gain and cost of low-rank branches on the shipped models.

    python benchmarks/low_rank.py --images 475

The base is ``policies.ptq4vit``; each of its models gets the branches that ``Policy.low_rank``
(``LowRank(rank=r)``, or ``share=``) would add. ``KL`` is the mean divergence KL(float || quantized)
of the outputs, in nats; ``kB`` the size of all parameters, ``+ kB`` that of the branches; ``+ MAC``
the multiplications of the branches, as a share of those of the linears; ``layers`` the number of
linears with a branch.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator

import torch
from accuracy import float_outputs, load, outputs, positive, score
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx

import fxquant
from fxquant import LowRank, Policy, policies
from fxquant.calibration.observe import observe
from fxquant.config.vocabulary import OpKind
from fxquant.demo.models import NAMES, build
from fxquant.graph.capture import capture
from fxquant.graph.dialect import op_kind
from fxquant.graph.macs import MacCounter
from fxquant.graph.parameter_bytes import quantized_bytes
from fxquant.passes import AssignSpecs, AttachLowRank, InsertObservers, run_passes
from fxquant.passes.canonical.canonicalize import CANONICAL
from fxquant.search.product_loss import ProductSample
from fxquant.utils.progress import track

WIDTHS = ("4,4", "3,3", "4,8", "3,8")


def row_sampler(name: str, images: Tensor, policy: Policy) -> dict[str, ProductSample]:
    """The rows that ``compile()`` samples for this policy."""
    gm = capture(build(name), images)
    run_passes(gm, (*CANONICAL, AssignSpecs(policy.rules), InsertObservers()))
    assert policy.samples is not None
    return observe(gm, [(part, None) for part in images.split(16)], policy.samples).samples


def multiplications(gm: fx.GraphModule) -> int:
    """Multiplications of all linears, for one image."""
    work = MacCounter(gm)
    return sum(work.macs(node) for node in gm.graph.nodes if op_kind(node) is OpKind.LINEAR)


def variants(options: argparse.Namespace) -> Iterator[tuple[str, LowRank | None]]:
    """The compared branches by name."""
    yield "none", None
    yield from ((f"rank {rank}", LowRank(rank=rank)) for rank in options.ranks)
    yield from ((f"share {share}", LowRank(share=share)) for share in options.shares)


def measure(name: str, policy: Policy, draw: int, options: argparse.Namespace) -> list[list[float]]:
    """Measures a row per variant: the columns of the table, from top-1 on."""
    images, _ = load("calib", draw * options.calibration, options.calibration)
    labels = load("test", 0, options.images)[1]
    base = fxquant.compile(build(name), images.split(16), policy).graph_module
    rows = row_sampler(name, images, policy)
    size, work = quantized_bytes(base), multiplications(base)
    exact, found = float_outputs(name, options.images), []
    for _, low_rank in variants(options):
        gm, layers = copy.deepcopy(base), 0
        if low_rank is not None:
            layers = run_passes(gm, [AttachLowRank(rows, low_rank)])["AttachLowRank"].changed
        quality = score(outputs(gm, options.images), exact, labels)
        bytes_now = quantized_bytes(gm)
        added = (bytes_now - size) / 1e3, 100 * (multiplications(gm) / work - 1)
        found.append([*quality, bytes_now / 1e3, *added, float(layers)])
    return found


def main() -> None:
    """Prints a table per model; figures are means over the draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--widths", nargs="+", default=list(WIDTHS), help="as 4,8: W4A8")
    parser.add_argument("--ranks", nargs="*", type=int, default=[4, 8, 16, 32])
    parser.add_argument("--shares", nargs="*", type=float, default=[0.1, 0.2])
    parser.add_argument("--images", type=positive, default=950, help="test images")
    parser.add_argument("--calibration", type=positive, default=32, help="images of one draw")
    parser.add_argument("--draws", type=positive, default=1, help="calibration draws")
    parser.add_argument("--first-draw", type=int, default=0, help="number of the first")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.models:
        table = Table(name, "branches", "top-1 %", "KL", "kB", "+ kB", "+ MAC %", "layers")
        for widths in track(options.widths, label=name, total=len(options.widths)):
            weight_bits, act_bits = map(int, widths.split(","))
            policy = policies.ptq4vit(weight_bits, act_bits)
            chosen = range(options.first_draw, options.first_draw + options.draws)
            draws = [measure(name, policy, draw, options) for draw in chosen]
            means = torch.tensor(draws).mean(0).tolist()
            for (label, _), row in zip(variants(options), means, strict=True):
                cells = zip(row, (1, 3, 0, 0, 1, 0), strict=True)
                shown = (f"{value:.{digits}f}" for value, digits in cells)
                table.add_row(f"W{weight_bits}A{act_bits}", label, *shown)
            table.add_section()
        Console(width=100).print(table)


if __name__ == "__main__":
    main()
