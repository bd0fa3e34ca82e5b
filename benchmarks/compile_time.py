"""Time and peak memory of ``fxquant.compile``, and how they grow.

    python benchmarks/compile_time.py --model deit_small_patch16_224 --images 32

Each row is a process of its own, so that peak memory is that of this compilation. Weights are
random: the time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import timm
import torch
from rich.console import Console
from rich.table import Table

import fxquant


def measure(model_name: str, images: int, policy: str, threads: int, depth: int | None) -> None:
    """Compiles once and prints the figures as JSON."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    options = {} if depth is None else {"depth": depth}
    model = timm.create_model(model_name, **options).eval()
    batches = torch.randn(images, *model.pretrained_cfg["input_size"]).split(8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    compiled = fxquant.compile(model, batches, policy)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = {"seconds": seconds, "peak": peak / 1e6, "before": before / 1e6}
    print(json.dumps({**figures, "phases": compiled.report.seconds}))


def main() -> None:
    """Prints a table: the model as asked, then with half the depth and half the images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm model")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--policy", default="w8a8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth", type=int, help="blocks; the model's own if not given")
    parser.add_argument("--one", action="store_true", help="one compilation, figures as JSON")
    options = parser.parse_args()
    if options.one:
        measure(options.model, options.images, options.policy, options.threads, options.depth)
        return
    table = Table("model", "blocks", "images", "seconds", "peak GB", "of it before", "phases, s")
    rows = [(12, options.images), (6, options.images), (12, 2 * options.images)]
    for depth, images in rows:
        command = [sys.executable, __file__, "--one", "--model", options.model]
        command += ["--images", str(images), "--policy", options.policy, "--depth", str(depth)]
        command += ["--threads", str(options.threads)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        figures = json.loads(done.stdout.splitlines()[-1])
        phases = ", ".join(f"{name} {value:.1f}" for name, value in figures["phases"].items())
        numbers = [f"{figures[key]:.2f}" for key in ("seconds", "peak", "before")]
        table.add_row(options.model, str(depth), str(images), *numbers, phases)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
