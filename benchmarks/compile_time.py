"""Time and peak memory of ``fxquant.compile``, and their growth with the size of the model.

    python benchmarks/compile_time.py --policy ptq4vit --bits 6 --out results.json

Each row runs in its own process, so that peak memory is that of one compilation. Weights are
random: the time does not depend on weights. For a policy that searches scales, two more processes
search one and two blocks of the model by brute force: every candidate in every round on all tokens
of all images (in attention on 64 queries of each image).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from results import write_results
from rich.console import Console
from rich.table import Table

import fxquant
from fxquant import Allocation, Budget, Policy, policies

# More rows than any product has: every row is sampled.
_ALL_ROWS = 1 << 40


def recipe(options: argparse.Namespace) -> Policy:
    """The policy of the options."""
    bits, effort = options.bits, options.effort
    budget = Budget(mean_bits=options.mean_bits) if options.mean_bits else None
    if options.brute_force:
        budget = None
    # As on the command line: a preset that takes a budget may have more steps with one.
    own_budget = budget if policies.takes(options.policy, "budget") else None
    values = {"weight_bits": bits, "act_bits": bits, "effort": effort, "budget": own_budget}
    policy = policies.preset(options.policy, **values)
    if budget is not None and policy.allocation is None:
        policy = replace(policy, allocation=Allocation(budget=budget))
    if options.brute_force and policy.search is not None:
        whole = replace(policy.search, stride=1, rows=_ALL_ROWS, memory_bytes=1 << 60)
        return replace(policy, search=whole)
    return policy


def measure(options: argparse.Namespace) -> None:
    """Compiles once and prints the figures as JSON."""
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    given = {"depth": options.depth, "embed_dim": options.width}
    sizes = {key: value for key, value in given.items() if value is not None}
    if options.width is not None:
        sizes["num_heads"] = options.width // 64
    model = timm.create_model(options.model, **sizes).eval()
    batches = torch.randn(options.images, *model.pretrained_cfg["input_size"]).split(8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    compiled = fxquant.compile(model, batches, recipe(options))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = {"seconds": seconds, "peak": peak / 1e6, "before": before / 1e6}
    print(json.dumps({**figures, "phases": compiled.report.seconds}))


def run(options: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """Measures in a new process, with some options changed."""
    command = [sys.executable, __file__, "--one"]
    for name, value in {**vars(options), **changes, "out": None}.items():
        if value is True:
            command.append(f"--{name.replace('_', '-')}")
        elif value is not None and value is not False:
            command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def compare_brute_force(options: argparse.Namespace, seconds: float, blocks: int) -> None:
    """Prints the speed of the whole compilation relative to brute-force search alone.

    The time of a block is the difference between two blocks and one; the rest is the time of the
    first and the last layer.
    """
    one, two = (run(options, depth=depth, brute_force=True)["phases"]["search"] for depth in (1, 2))
    whole = one + (blocks - 1) * (two - one)
    print(
        f"brute force: a block's scales {two - one:.1f} s, so {blocks} blocks with the first and "
        f"the last layer {whole:.0f} s: {whole / seconds:.0f} times the whole compilation "
        f"({seconds:.1f} s)"
    )


def main() -> None:
    """Prints a table: the model, then with half the depth, half the width, and twice the images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm ViT")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--policy", default="w8a8", help="preset")
    parser.add_argument("--bits", type=int, help="width of a preset that takes one")
    parser.add_argument("--mean-bits", type=float, help="mixed precision of that mean width")
    parser.add_argument("--effort", help="effort of preset best")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth", type=int, help="blocks; the model's own if not given")
    parser.add_argument("--width", type=int, help="channels; the model's own if not given")
    parser.add_argument("--brute-force", action="store_true", help="every candidate on every row")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--one", action="store_true", help="one compilation, figures as JSON")
    options = parser.parse_args()
    if options.one:
        measure(options)
        return
    model = timm.create_model(options.model)
    blocks, width = options.depth or len(model.blocks), options.width or model.embed_dim
    table = Table("blocks", "channels", "images", "seconds", "peak GB", "of it before", "phases, s")
    rows = [
        (blocks, width, options.images),
        (blocks // 2, width, options.images),
        (blocks, width // 2, options.images),
        (blocks, width, 2 * options.images),
    ]
    results: list[dict[str, Any]] = []
    for depth, channels, images in rows:
        figures = run(options, depth=depth, width=channels, images=images)
        phases = ", ".join(f"{name} {value:.1f}" for name, value in figures["phases"].items())
        numbers = [f"{figures[key]:.2f}" for key in ("seconds", "peak", "before")]
        table.add_row(str(depth), str(channels), str(images), *numbers, phases)
        results.append({"blocks": depth, "channels": channels, "images": images, **figures})
    print(f"{options.model}, {recipe(options).name}, {options.threads} threads")
    Console(width=120).print(table)
    if options.out is not None:
        write_results(options.out, "compile_time", vars(options), results, options.threads)
    if recipe(options).search is not None:
        compare_brute_force(options, results[0]["seconds"], blocks)


if __name__ == "__main__":
    main()
