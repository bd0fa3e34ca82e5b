"""Ablation: top-1 of the shipped models by method and width, over calibration draws.

    python benchmarks/accuracy.py --out ablation

From min-max to PTQ4ViT (arXiv 2111.12293): ``base PTQ`` searches scales by cosine distance, one
round from half the range; ``+ rounds`` takes three and the whole range; ``+ Hessian`` then
compares by squared error weighted by gradients; ``+ twin`` is the base with twin quantizers,
``+ both`` the preset; ``RepQ`` moves channels behind LayerNorms onto one range first; ``row by
row`` weighs each row by its own gradient, of the arg-max cross-entropy, as the paper does. ``+
Hessian, symmetric`` quantizes what softmax and GELU give as the paper's uniform baseline does.

Simulated on held-out images; each draw calibrates on other images. Prints a table and writes it
as CSV, beside a plot. Each measurement is written to ``draws.csv`` as soon as it is there; a run
with the same folder goes on where the last one stopped. Delete the folder after a change of code.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxquant
from fxquant import Policy, Rule, TensorSpec, policies
from fxquant.demo.glyphs import GlyphDataset
from fxquant.demo.models import NAMES, build
from fxquant.progress import track
from fxquant.spec import GradientLoss, Metric

WIDTHS = (8, 6, 5, 4, 3)
FLOAT = "float32"


class Job(NamedTuple):
    """One measurement: a model, a width, a method, a draw of calibration images."""

    model: str
    bits: int
    method: str
    draw: int
    calibration: int
    images: int


def methods(bits: int) -> dict[str, Policy]:
    """The steps of the ablation, all weights and activations at one width."""
    base, whole = policies.base_ptq(bits, bits), policies.ptq4vit(bits, bits)
    assert base.search is not None and whole.search is not None
    by_cosine = replace(whole.search, metric=Metric.COSINE)
    by_row = replace(whole.search, metric=Metric.HESSIAN, loss=GradientLoss.ARGMAX)
    uniform = policies.ptq4vit(bits, bits, twin=False)
    symmetric = TensorSpec(bits=bits, symmetric=True)
    skewed = tuple(Rule(fed_by=name, spec=symmetric) for name in ("softmax", "gelu"))
    steps = {
        "min-max": policies.minmax(bits, bits),
        "base PTQ": base,
        "+ rounds": replace(base, search=by_cosine),
        "+ Hessian, symmetric": uniform.with_rules(*skewed),
        "+ Hessian": uniform,
        "+ twin": replace(whole, search=base.search),
        "+ both": whole,
        "+ both, RepQ": replace(whole, reparameterize=True),
        "+ both, row by row": replace(whole, search=by_row),
    }
    return {**steps, "w8a8": policies.w8a8()} if bits == 8 else steps


@cache
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


def measure(job: Job) -> float:
    """Top-1 in percent of one job."""
    model = build(job.model)
    if job.method != FLOAT:
        images, _ = load("calib", job.draw * job.calibration, job.calibration)
        policy = methods(job.bits)[job.method]
        model = fxquant.compile(model, images.split(16), policy)
    return top1(model, *load("test", 0, job.images))


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """All measurements."""
    sizes = (options.calibration, options.images)
    for model in options.models:
        yield Job(model, 32, FLOAT, 0, *sizes)
        for bits in options.widths:
            names = [n for n in methods(bits) if not options.methods or n in options.methods]
            for name, draw in itertools.product(names, range(options.draws)):
                yield Job(model, bits, name, draw, *sizes)


def run(work: list[Job], path: Path, processes: int) -> dict[Job, float]:
    """The figures of all jobs: those in the file, and the others, which are added to it."""
    done: dict[Job, float] = {}
    if path.exists():
        for row in csv.reader(path.open(encoding="utf-8")):
            model, bits, method, draw, calibration, images, score = row
            job = Job(model, int(bits), method, int(draw), int(calibration), int(images))
            done[job] = float(score)
    left = [job for job in work if job not in done]
    with (
        path.open("a", newline="", encoding="utf-8") as file,
        ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool,
    ):
        found = track(pool.map(measure, left), label="measure", total=len(left))
        for job, score in zip(left, found, strict=True):
            done[job] = score
            csv.writer(file).writerow([*job, f"{score:.4f}"])
            file.flush()
    return {job: done[job] for job in work}


def table(scores: dict[tuple[str, int, str], list[float]], model: str) -> Table:
    """Mean top-1 over the draws and, in brackets, largest less smallest; a column a width."""
    own = {key[1:]: found for key, found in scores.items() if key[0] == model}
    (exact,) = own.pop((32, FLOAT))
    widths = list(dict.fromkeys(bits for bits, _ in own))
    shown = Table(f"{model}, float32 {exact:.1f} %", *(f"W{bits}A{bits}" for bits in widths))
    for method in dict.fromkeys(name for _, name in own):
        found = [own.get((bits, method)) for bits in widths]
        cells = [f"{np.mean(draws):.1f} ({np.ptp(draws):.1f})" if draws else "" for draws in found]
        shown.add_row(method, *cells)
    return shown


def write_csv(scores: dict[tuple[str, int, str], list[float]], path: Path) -> None:
    """A row a model, width and method: mean, spread (largest less smallest), points lost, draws."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "bits", "method", "top-1 %", "spread", "lost", "draws"])
        for (model, bits, method), found in scores.items():
            mean, exact = np.mean(found), scores[model, 32, FLOAT][0]
            figures = [f"{value:.2f}" for value in (mean, np.ptp(found), exact - mean)]
            writer.writerow([model, bits, method, *figures, len(found)])


def plot(scores: dict[tuple[str, int, str], list[float]], path: Path) -> None:
    """Top-1 over the width, a line a method, a panel a model."""
    from matplotlib import pyplot

    models = list(dict.fromkeys(model for model, _, _ in scores))
    figure, panels = pyplot.subplots(1, len(models), figsize=(5.5 * len(models), 4), squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        own = {key[1:]: found for key, found in scores.items() if key[0] == model}
        panel.axhline(own.pop((32, FLOAT))[0], color="grey", linestyle=":", label=FLOAT)
        for method in dict.fromkeys(name for _, name in own):
            points = sorted((bits, found) for (bits, name), found in own.items() if name == method)
            means = [np.mean(found) for _, found in points]
            ends = [[m - min(f), max(f) - m] for m, (_, f) in zip(means, points, strict=True)]
            widths = [bits for bits, _ in points]
            panel.errorbar(widths, means, np.transpose(ends), marker="o", capsize=3, label=method)
        panel.set(title=model, xlabel="bits of weights and activations", ylabel="top-1 %")
        panel.set_xticks(sorted({bits for bits, _ in own}))
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Prints a table a model; writes ``accuracy.csv`` and ``accuracy.png``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--methods", nargs="+", choices=list(methods(8)))
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS))
    parser.add_argument("--images", type=int, default=950, help="test images")
    parser.add_argument("--calibration", type=int, default=32, help="images of one draw")
    parser.add_argument("--draws", type=int, default=5, help="calibration draws")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--out", type=Path, default=Path("ablation"), help="folder for the files")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    scores: dict[tuple[str, int, str], list[float]] = {}
    for job, score in run(
        list(jobs(options)), options.out / "draws.csv", options.processes
    ).items():
        scores.setdefault((job.model, job.bits, job.method), []).append(score)
    for model in options.models:
        Console(width=120).print(table(scores, model))
    write_csv(scores, options.out / "accuracy.csv")
    plot(scores, options.out / "accuracy.png")


if __name__ == "__main__":
    main()
