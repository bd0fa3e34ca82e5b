"""The command ``demo``: compares one shipped model in every runtime, in a table."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save
from torch import Tensor, nn

from fxquant.cli import commands
from fxquant.cli.data import DEMO, batches, open_data
from fxquant.cli.evaluation import (
    Runtime,
    Score,
    evaluate,
    measure_latency,
    onnx_runtime,
    torch_runtime,
)
from fxquant.cli.models import DEMO_MODELS, Weights, build_model, find_model, preprocessing_of
from fxquant.compiled.model import CompiledModel
from fxquant.compiled.storage import WEIGHTS_FILE
from fxquant.compiler import compile
from fxquant.errors import ModelError
from fxquant.utils.files import check_writable
from fxquant.utils.progress import track
from fxquant.utils.suggest import did_you_mean

_POLICY, _CALIBRATION_IMAGES, _BATCH = "w8a8", 32, 8
# Enough for a median; the integer reference kernels are slow.
_ROUNDS = {1: 7, 8: 3}
_FLOAT, _SIMULATION, _ONNX, _INTEGER = (
    "torch float32",
    "torch simulation",
    "onnxruntime",
    "integer kernels*",
)
# The last line, where no folder is kept.
NEXT = (
    "next: fxquant compile timm/deit_small_patch16_224 --pretrained --data FOLDER --out DIR, "
    "then fxquant eval DIR --data FOLDER"
)


def run_demo(options: Namespace) -> int:
    """``fxquant demo``: compiles, exports, evaluates, prints the table."""
    if options.model not in DEMO_MODELS:
        raise ModelError(
            f"no demo model {options.model!r}{did_you_mean(options.model, DEMO_MODELS)}; there "
            f"are {', '.join(DEMO_MODELS)}. For others: fxquant compile",
            got=options.model,
            expected=DEMO_MODELS,
        )
    if options.out is not None:
        check_writable(options.out)
    # One thread gives steady, comparable times; such small products gain little from more threads.
    threads_before, threads = torch.get_num_threads(), options.threads or 1
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            _compare(options.model, options.images, options.out or Path(temporary), threads)
    finally:
        torch.set_num_threads(threads_before)
    print(NEXT if options.out is None else f"next: fxquant eval {options.out} --data {DEMO}")
    return 0


def _compare(name: str, count: int, folder: Path, threads: int) -> None:
    source = find_model(name)
    preprocessing = preprocessing_of(source)
    model = build_model(source, Weights(), {})
    calibration = open_data(
        DEMO, preprocessing, labelled=False, split="calib", count=_CALIBRATION_IMAGES
    )
    compiled = compile(model, batches(calibration, None, _BATCH, 0), _POLICY, progress=True)
    commands.write_artifacts(compiled, preprocessing, folder)
    runtimes = _runtimes(model, compiled, folder / commands.ONNX_FILE, threads)
    # Drawn once, for all runtimes; smaller batches than a server's keep caches warm.
    loader = batches(open_data(DEMO, preprocessing, labelled=True, count=count), None, 32, 0)
    data = [(x, y) for x, y in track(loader, label="draw test images", total=len(loader))]
    scores = {key: evaluate(runtime, data, len(data)) for key, runtime in runtimes.items()}
    saved_bytes = (folder / WEIGHTS_FILE).stat().st_size
    sizes = {
        _FLOAT: len(save({k: v.contiguous() for k, v in model.state_dict().items()})),
        _SIMULATION: saved_bytes,
        _ONNX: (folder / commands.ONNX_FILE).stat().st_size,
        _INTEGER: saved_bytes,
    }
    example = data[0][0][:1].expand(_BATCH, -1, -1, -1).contiguous()
    title = f"{name}, policy {_POLICY}, {count} test images, {threads} thread(s)"
    Console().print(_table(title, scores, sizes, _latencies(runtimes, example)))
    print("* reference kernels: exact integer sums in plain torch, not made for speed")


def _runtimes(
    model: nn.Module, compiled: CompiledModel, path: Path, threads: int
) -> dict[str, Runtime]:
    return {
        _FLOAT: torch_runtime(_FLOAT, model),
        _SIMULATION: torch_runtime(_SIMULATION, compiled),
        _ONNX: onnx_runtime(path, threads),
        _INTEGER: torch_runtime(_INTEGER, compiled.lower("integer")),
    }


def _latencies(runtimes: dict[str, Runtime], example: Tensor) -> dict[int, dict[str, float]]:
    with torch.inference_mode():
        return {
            batch: measure_latency(runtimes, example[:batch], rounds)
            for batch, rounds in _ROUNDS.items()
        }


def _table(
    title: str,
    scores: dict[str, Score],
    sizes: dict[str, int],
    latencies: dict[int, dict[str, float]],
) -> Table:
    table = Table(title=title)
    table.add_column("runtime", no_wrap=True)
    for column in ("top-1 %", "agreement %", "MB", *(f"ms/image\nbatch {n}" for n in latencies)):
        table.add_column(column, justify="right")
    for key, score in scores.items():
        agreement = (score.predictions == scores[_SIMULATION].predictions).float().mean().item()
        times = [f"{times[key]:.2f}" for times in latencies.values()]
        table.add_row(
            key,
            f"{100 * score.top1:.1f}",
            f"{100 * agreement:.1f}",
            f"{sizes[key] / 1e6:.2f}",
            *times,
        )
    return table
