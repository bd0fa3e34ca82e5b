"""Runtimes under one interface, and their accuracy and speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import DataError, ModelError
from fxquant.utils.progress import track

_TOP = 5


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Something that computes outputs of images.

    Attributes:
        name: name in reports.
        run: images ``(B, C, H, W)`` to outputs ``(B, …)``; the first output of a classifier is
            scores ``(B, classes)``.
        image_shape: shape of one image; None where any size works.
    """

    name: str
    run: Callable[[Tensor], tuple[Tensor, ...]]
    image_shape: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """Accuracy and speed on labelled images.

    Attributes:
        name: name of the runtime.
        top1: share of images whose highest score is the label's.
        top5: share of images whose five highest scores include the label's.
        classes: number of scores.
        seconds: time in the model, without reading of images.
        predictions: class with the highest score, ``(N,)``.
    """

    name: str
    top1: float
    top5: float
    classes: int
    seconds: float
    predictions: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        images = len(self.predictions)
        return {
            "runtime": self.name,
            "images": images,
            "images_per_second": images / self.seconds,
            "top1": self.top1,
            "top5": self.top5 if self.classes > _TOP else None,
            "classes": self.classes,
        }

    def __str__(self) -> str:
        """A line with the number of images, the accuracy and the speed."""
        images = len(self.predictions)
        top5 = f", top-5 {self.top5:.2%}" if self.classes > _TOP else ""
        return (
            f"{self.name}: {images} images, top-1 {self.top1:.2%}{top5}, "
            f"{images / self.seconds:.1f} images/s"
        )


def torch_runtime(
    name: str, module: nn.Module, image_shape: tuple[int, ...] | None = None
) -> Runtime:
    """Wraps a module as a runtime.

    Args:
        name: name in reports.
        module: returns a tensor or a structure of tensors.
        image_shape: shape of one image.
    """

    def run(images: Tensor) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            leaves = torch.utils._pytree.tree_leaves(module(images))
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    return Runtime(name=name, run=run, image_shape=image_shape)


def onnx_runtime(path: Path, threads: int | None) -> Runtime:
    """Opens an ONNX file in onnxruntime.

    Args:
        path: ONNX file whose first input is images.
        threads: threads of one operator; None uses onnxruntime's default.

    Raises:
        FileFormatError: onnxruntime cannot load the file.
    """
    from fxquant.backends.onnx_qdq import make_session

    session = make_session(path, threads)
    entry = session.get_inputs()[0]
    fixed = [size for size in entry.shape[1:] if isinstance(size, int) and size > 0]
    batch = entry.shape[0] if entry.shape and isinstance(entry.shape[0], int) else None

    def run_once(images: Tensor) -> tuple[Tensor, ...]:
        try:
            outputs = session.run(None, {entry.name: images.numpy()})
            return tuple(torch.as_tensor(output) for output in outputs)
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise ModelError(
                f"{path} does not run on images of shape {tuple(images.shape)}: "
                f"{str(error)[:200]}. It must take float32 images (B, 3, H, W) as its one input",
                got=tuple(images.shape),
            ) from error

    def run(images: Tensor) -> tuple[Tensor, ...]:
        if batch is None:
            return run_once(images)
        chunks = []
        # The file has a fixed batch size: the last batch is padded.
        for chunk in torch.split(images, batch):
            padded = torch.cat([chunk, chunk[:1].expand(batch - len(chunk), *chunk.shape[1:])])
            chunks.append([output[: len(chunk)] for output in run_once(padded)])
        return tuple(torch.cat(outputs) for outputs in zip(*chunks, strict=True))

    shape = tuple(fixed) if len(fixed) == len(entry.shape) - 1 else None
    return Runtime(name=f"{path.name} in onnxruntime", run=run, image_shape=shape)


def evaluate(runtime: Runtime, data: Iterable[tuple[Tensor, Tensor]], count: int = 0) -> Score:
    """Measures accuracy and speed on all batches.

    Args:
        runtime: runtime to measure.
        data: batches of images and labels ``(B,)``.
        count: number of batches, for progress; 0 if unknown.

    Raises:
        DataError: the images or labels do not fit the model.
        ModelError: the output of the runtime is not scores ``(B, classes)``.
    """
    predictions, hits, seconds, classes = [], torch.zeros(2), 0.0, 0
    for images, labels in track(data, label=runtime.name, total=count):
        check_images(runtime, images)
        start = time.perf_counter()
        scores = runtime.run(images)[0]
        seconds += time.perf_counter() - start
        _check_scores(runtime, scores, labels)
        classes = scores.shape[1]
        best = scores.topk(min(_TOP, classes)).indices
        right = best == labels[:, None]
        hits += torch.stack([right[:, 0].sum(), right.any(1).sum()])
        predictions.append(best[:, 0])
    all_predictions = torch.cat(predictions)
    top1, top5 = (hits / len(all_predictions)).tolist()
    return Score(
        name=runtime.name,
        top1=top1,
        top5=top5,
        classes=classes,
        seconds=seconds,
        predictions=all_predictions,
    )


def check_images(runtime: Runtime, images: Tensor) -> None:
    """Checks the shape of images.

    Raises:
        DataError: the images do not fit the model.
    """
    shape = tuple(images.shape[1:])
    if runtime.image_shape is not None and shape != runtime.image_shape:
        raise DataError(
            f"{runtime.name} takes images of shape {runtime.image_shape}, the preprocessing gives "
            f"{shape}; set --image-size",
            got=shape,
            expected=runtime.image_shape,
        )


def _check_scores(runtime: Runtime, scores: Tensor, labels: Tensor) -> None:
    if scores.ndim != 2 or len(scores) != len(labels):
        raise ModelError(
            f"{runtime.name} gives {tuple(scores.shape)} for {len(labels)} images, not scores "
            "(images, classes); accuracy can be measured for classifiers only. --reference "
            "compares other outputs with the float model's",
            got=tuple(scores.shape),
            expected="(images, classes)",
        )
    if int(labels.max()) >= scores.shape[1]:
        raise DataError(
            f"label {int(labels.max())} (class folders are numbered by name, from 0) is beyond "
            f"the {scores.shape[1]} outputs of {runtime.name}; give the data that it was "
            "trained for",
            got=int(labels.max()),
            expected=f"< {scores.shape[1]}",
        )


def measure_latency(
    runtimes: Mapping[str, Runtime], images: Tensor, rounds: int
) -> dict[str, float]:
    """Median milliseconds per image; runtimes are timed in turn, so that noise affects all alike.

    Args:
        runtimes: runtimes by name.
        images: one batch.
        rounds: number of timed runs of each, after one run to warm up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runtimes}
    for i in range(rounds + 1):
        for name, runtime in runtimes.items():
            start = time.perf_counter()
            runtime.run(images)
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: sorted(values)[len(values) // 2] / len(images) * 1e3
        for name, values in seconds.items()
    }
