"""Ablation: top-1 of the shipped models by method and width, over calibration draws.

    python benchmarks/accuracy.py --out ablation

The methods lead from min-max to PTQ4ViT (arXiv 2111.12293): ``base PTQ`` searches scales by cosine
distance, one round from half the range; ``+ rounds`` searches three rounds over the whole range;
``+ Hessian`` then compares by squared error weighted by gradients; ``+ twin`` is the base with twin
quantizers, ``+ both`` the preset. ``RepQ`` first maps channels after LayerNorms onto one range;
``row by row`` weights each row by its own gradient, of the arg-max cross-entropy, as the paper
does, and ``as published`` additionally has the paper's symmetric quantizers and weights per tensor.
``+ Hessian, symmetric`` quantizes the outputs of softmax and GELU as the paper's uniform baseline
does; ``ends at 8 bits`` keeps the first and last layers at 8 bits, as ``best`` does and ``best,
ends alike`` does not. ``OPT-m`` searches the ratio of a twin's regions, ``MPTQ-ViT`` (arXiv
2401.14895) smooths channels as well; ``by columns`` then rounds weights by GPTQ, later columns
compensating earlier ones, after ``ridge`` has compensated the errors of the activations. ``+ both,
uniform``, ``focusing`` (arXiv 2502.04628), ``log2`` and ``AdaLog`` (arXiv 2407.12951) have other
quantizers after softmax. ``mixed`` chooses a width for each edge, of the same mean over weights and
activations together, ``mixed apart`` of the same mean over each (only at 4 and 5 bits). ``best`` is
our own choice: untrained and by effort, also with mixed widths, and with only weights or only
activations at the width (the other ``at 8 bits``); with efforts beyond seconds, ``no ridge`` does
not compensate activations before weights are rounded, and ``codes stay`` does not train codes.
``AIQViT`` (arXiv 2502.04628) adds one part after the other. Methods that train run only where
``--methods`` names them. ``best, minutes`` and ``hours`` are designed for ``--calibration 1024``,
the other methods for the 32 images of the default.

The quantized models are simulated on held-out images; each draw calibrates on different images. The
script prints two tables per model: top-1 and, far less noisy, the mean divergence KL(float ||
quantized) of the outputs. It writes both as CSV and, with the machine, as JSON, next to a plot.
Each measurement is written to ``draws.csv`` at once, draw by draw; a run with the same folder
continues where the last run stopped. Delete the folder after a change of code.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from recipes import methods
from results import write_results
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import kl_div

import fxquant
from fxquant.demo.glyphs import GlyphDataset
from fxquant.demo.models import NAMES, build
from fxquant.utils.progress import track

WIDTHS = (8, 6, 5, 4, 3)
FLOAT = "float32"
# (model, width, method) -> the score of each draw.
Scores = dict[tuple[str, int, str], list["Score"]]


class Job(NamedTuple):
    """A measurement: a model, a width, a method, a draw of calibration images."""

    model: str
    bits: int
    method: str
    draw: int
    calibration: int
    images: int


@cache
def load(split: str, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Images ``(count, 3, 64, 64)`` and labels ``(count,)`` of a split, from ``start`` on."""
    data = GlyphDataset(split, start + count)
    images, labels = zip(*(data[i] for i in range(start, start + count)), strict=True)
    return torch.stack(images), torch.tensor(labels)


class Score(NamedTuple):
    """Top-1 of a job in percent, and mean KL(float || quantized) over the images, in nats."""

    top1: float
    divergence: float


@torch.no_grad()
def outputs(model: nn.Module, images: int) -> Tensor:
    """Log-probabilities of the test images, ``(images, classes)``."""
    parts = load("test", 0, images)[0].split(50)
    return torch.cat([model(part).log_softmax(1) for part in parts])


@cache
def float_outputs(name: str, images: int) -> Tensor:
    """Log-probabilities of the float model, ``(images, classes)``."""
    return outputs(build(name), images)


def score(found: Tensor, exact: Tensor, labels: Tensor) -> Score:
    """Scores the log-probabilities of a model against the float model's and the labels."""
    right = 100 * float((found.argmax(1) == labels).float().mean())
    return Score(right, float(kl_div(found, exact, log_target=True, reduction="batchmean")))


def measure(job: Job, sensitivities: Path) -> Score:
    """Runs a job; the sensitivities that mixed precision measures are cached in a folder."""
    exact = found = float_outputs(job.model, job.images)
    if job.method != FLOAT:
        images, _ = load("calib", job.draw * job.calibration, job.calibration)
        policy = methods(job.bits)[job.method]
        model = fxquant.compile(build(job.model), images.split(16), policy, cache=sensitivities)
        found = outputs(model, job.images)
    return score(found, exact, load("test", 0, job.images)[1])


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Yields the measurements of all models, widths, methods and draws."""
    sizes = (options.calibration, options.images)
    yield from (Job(model, 32, FLOAT, 0, *sizes) for model in options.models)
    for draw, model, bits in itertools.product(
        range(options.draws), options.models, options.widths
    ):
        for name, policy in methods(bits).items():
            asked = options.methods or ()
            if name in asked or not (asked or policy.reconstruction):
                yield Job(model, bits, name, draw, *sizes)


def run(work: list[Job], path: Path, processes: int) -> dict[Job, Score]:
    """The scores of all jobs: read from the file where it has them, else measured and added."""
    done: dict[Job, Score] = {}
    if path.exists():
        for row in csv.reader(path.open(encoding="utf-8")):
            model, bits, method, draw, calibration, images, right, divergence = row
            job = Job(model, int(bits), method, int(draw), int(calibration), int(images))
            done[job] = Score(float(right), float(divergence))
    left = [job for job in work if job not in done]
    one = partial(measure, sensitivities=path.parent / "sensitivities")
    with (
        path.open("a", newline="", encoding="utf-8") as file,
        ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool,
    ):
        running = {pool.submit(one, job): job for job in left}
        for future in track(as_completed(running), label="measure", total=len(left)):
            job, score = running[future], future.result()
            done[job] = score
            csv.writer(file).writerow([*job, f"{score.top1:.4f}", f"{score.divergence:.6f}"])
            file.flush()
    return {job: done[job] for job in work}


def table(scores: Scores, model: str, field: int) -> Table:
    """Table of means over the draws and, in brackets, largest minus smallest; a column per width.

    Args:
        scores: scores of all jobs.
        model: name of the model.
        field: index of the field of ``Score``.
    """
    own = {key[1:]: found for key, found in scores.items() if key[0] == model}
    ((exact, _),) = own.pop((32, FLOAT))
    widths = list(dict.fromkeys(bits for bits, _ in own))
    what, digits = ((f"top-1, float32 {exact:.1f} %", 1), ("KL", 3))[field]
    shown = Table(f"{model}, {what}", *(f"W{bits}A{bits}" for bits in widths))
    for method in dict.fromkeys(name for _, name in own):
        found = [own.get((bits, method)) for bits in widths]
        cells = [
            f"{_mean(draws, field):.{digits}f} ({_spread(draws, field):.{digits}f})"
            if draws
            else ""
            for draws in found
        ]
        shown.add_row(method, *cells)
    return shown


def _mean(found: list[Score], field: int) -> float:
    return float(np.mean([score[field] for score in found]))


def _spread(found: list[Score], field: int) -> float:
    return float(np.ptp([score[field] for score in found]))


def write_csv(scores: Scores, path: Path) -> None:
    """Writes a row per model, width and method: means, spreads (largest minus smallest), losses."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = ("top-1 %", "spread", "lost", "KL", "spread of KL")
        writer.writerow(["model", "bits", "method", *names, "draws"])
        for (model, bits, method), found in scores.items():
            mean, exact = _mean(found, 0), scores[model, 32, FLOAT][0].top1
            figures = [f"{value:.2f}" for value in (mean, _spread(found, 0), exact - mean)]
            figures += [f"{value:.4f}" for value in (_mean(found, 1), _spread(found, 1))]
            writer.writerow([model, bits, method, *figures, len(found)])


def plot(scores: Scores, path: Path) -> None:
    """Plots top-1 over the width, with a line per method and a panel per model."""
    from matplotlib import pyplot

    models = list(dict.fromkeys(model for model, _, _ in scores))
    figure, panels = pyplot.subplots(1, len(models), figsize=(5.5 * len(models), 4), squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        own = {key[1:]: found for key, found in scores.items() if key[0] == model}
        panel.axhline(own.pop((32, FLOAT))[0].top1, color="grey", linestyle=":", label=FLOAT)
        for method in dict.fromkeys(name for _, name in own):
            points = sorted(
                (bits, [score.top1 for score in found])
                for (bits, name), found in own.items()
                if name == method
            )
            means = [np.mean(found) for _, found in points]
            ends = [[m - min(f), max(f) - m] for m, (_, f) in zip(means, points, strict=True)]
            widths = [bits for bits, _ in points]
            panel.errorbar(widths, means, np.transpose(ends), marker="o", capsize=3, label=method)
        panel.set(title=model, xlabel="bits of weights and activations", ylabel="top-1 %")
        panel.set_xticks(sorted({bits for bits, _ in own}))
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def main() -> None:
    """Prints two tables per model; writes ``accuracy`` as CSV, JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--methods", nargs="+", choices=list(methods(8) | methods(4)))
    parser.add_argument("--widths", nargs="+", type=int, choices=range(2, 9), default=list(WIDTHS))
    parser.add_argument("--images", type=positive, default=950, help="test images")
    parser.add_argument("--calibration", type=positive, default=32, help="images of one draw")
    parser.add_argument("--draws", type=positive, default=5, help="calibration draws")
    parser.add_argument("--processes", type=positive, default=2, help="of one thread each")
    parser.add_argument("--out", type=Path, default=Path("ablation"), help="folder for the files")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    scores: Scores = {}
    for job, score in run(
        list(jobs(options)), options.out / "draws.csv", options.processes
    ).items():
        scores.setdefault((job.model, job.bits, job.method), []).append(score)
    for model, field in itertools.product(options.models, (0, 1)):
        Console(width=120).print(table(scores, model, field))
    rows = [
        {"model": model, "bits": bits, "method": method, **score._asdict()}
        for (model, bits, method), draws in scores.items()
        for score in draws
    ]
    write_results(options.out / "accuracy.json", "accuracy", vars(options), rows, threads=1)
    write_csv(scores, options.out / "accuracy.csv")
    plot(scores, options.out / "accuracy.png")


if __name__ == "__main__":
    main()
