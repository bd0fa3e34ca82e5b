"""Errors of a model's outputs against those of another model, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fxquant.graph.outputs import is_logits

# Values of a map above this threshold are inside its area.
_INSIDE = 0.5
# Embeddings compared with all others at a time, to bound the memory of their cosines.
_NEIGHBOUR_CHUNK = 1024
# Number of images from which the nearest of the other images means something.
_MIN_NEIGHBOURS = 3


class OutputKind(StrEnum):
    """The kinds of outputs.

    Attributes:
        LOGITS: ``(B, classes)``, a score for each class.
        EMBEDDING: ``(B, C)`` without classes.
        DENSE: any other shape, such as maps ``(B, C, H, W)`` and tokens ``(B, N, C)``.
    """

    LOGITS = "logits"
    EMBEDDING = "embedding"
    DENSE = "dense"


def kind_of(output: Tensor, *, embedding: bool) -> OutputKind:
    """The kind of an output.

    Args:
        output: the output of a batch.
        embedding: whether an output ``(B, C)`` is an embedding, not logits.
    """
    if not is_logits(output):
        return OutputKind.DENSE
    return OutputKind.EMBEDDING if embedding else OutputKind.LOGITS


@dataclass(frozen=True, kw_only=True)
class OutputError:
    """The difference of an output from a reference, over all images.

    Values that are not finite in the reference are left out.

    Attributes:
        name: ``output``, or ``output 0`` and so on where a model has several.
        kind: kind of the output.
        shape: shape of the output for one image.
        mae: mean absolute difference.
        largest: largest absolute difference.
        cosine: cosine of the output with its reference, the mean over images.
        sqnr: signal to quantization noise, dB.
        overlap: area above one half in both over the area above one half in either, of all images
            together; None unless the output is a map whose reference lies in 0..1.
        agreement: share of images with the same class of largest logit or, for embeddings, with the
            same nearest other image by cosine; None for dense outputs and for too few embeddings.
    """

    name: str
    kind: OutputKind
    shape: tuple[int, ...]
    mae: float
    largest: float
    cosine: float
    sqnr: float
    overlap: float | None = None
    agreement: float | None = None

    def __str__(self) -> str:
        """A line with all measures."""
        measures = [
            f"MAE {self.mae:.3g}",
            f"largest difference {self.largest:.3g}",
            f"cosine {self.cosine:.4f}",
            f"SQNR {self.sqnr:.1f} dB",
        ]
        if self.overlap is not None:
            measures.append(f"overlap of the areas above one half {self.overlap:.2%}")
        if self.agreement is not None:
            same = "top-1" if self.kind is OutputKind.LOGITS else "nearest neighbour"
            measures.append(f"same {same} {self.agreement:.2%}")
        return f"{self.name}, {self.kind} {self.shape}: {', '.join(measures)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; numbers that are not finite become texts."""
        return {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OutputError:
        """Restores an error from the values of :meth:`to_dict`."""
        measures = {
            key: None if values[key] is None else float(values[key])
            for key in ("mae", "largest", "cosine", "sqnr", "overlap", "agreement")
        }
        kind, shape = OutputKind(values["kind"]), tuple(values["shape"])
        return cls(**{**values, **measures, "kind": kind, "shape": shape})


class OutputComparison:
    """Collects the error of one output, batch by batch.

    Args:
        name: name of the output.
        kind: kind of the output.
    """

    def __init__(self, name: str, kind: OutputKind) -> None:
        self._name, self._kind = name, kind
        self._shape: tuple[int, ...] = ()
        self._images = self._values = self._same_class = 0
        self._signal = self._noise = self._distance = self._cosine = self._largest = 0.0
        self._in_unit_range, self._in_both, self._in_either = True, 0, 0
        self._embeddings: list[tuple[Tensor, Tensor]] = []

    def add(self, reference: Tensor, output: Tensor) -> None:
        """Adds a batch.

        Args:
            reference: ``(B, …)``.
            output: of the same shape.
        """
        if not reference.ndim:
            reference, output = reference[None], output[None]
        self._shape = tuple(reference.shape[1:])
        self._images += len(reference)
        finite = reference.isfinite()
        expected = reference.double().masked_fill(~finite, 0)
        actual = output.double().masked_fill(~finite, 0)
        difference = (actual - expected).abs()
        self._values += int(finite.sum())
        self._distance += float(difference.sum())
        largest = difference.new_tensor([self._largest])
        self._largest = float(torch.cat([difference.flatten(), largest]).max())
        self._signal += float(expected.square().sum())
        self._noise += float(difference.square().sum())
        self._cosine += float(_cosines(expected, actual).sum())
        if self._kind is OutputKind.DENSE:
            self._add_areas(expected, actual)
        elif self._kind is OutputKind.LOGITS:
            self._same_class += int((reference.argmax(1) == output.argmax(1)).sum())
        else:
            self._embeddings.append((reference, output))

    def _add_areas(self, expected: Tensor, actual: Tensor) -> None:
        self._in_unit_range &= bool(((expected >= 0) & (expected <= 1)).all())
        one, two = expected > _INSIDE, actual > _INSIDE
        self._in_both += int((one & two).sum())
        self._in_either += int((one | two).sum())

    def result(self) -> OutputError:
        """The error over all batches so far."""
        overlap = None
        if self._kind is OutputKind.DENSE and len(self._shape) > 1 and self._in_unit_range:
            overlap = self._in_both / self._in_either if self._in_either else 1.0
        images = max(self._images, 1)
        return OutputError(
            name=self._name,
            kind=self._kind,
            shape=self._shape,
            mae=self._distance / max(self._values, 1),
            largest=self._largest,
            cosine=self._cosine / images,
            sqnr=decibels(self._signal, self._noise),
            overlap=overlap,
            agreement=self._agreement(),
        )

    def _agreement(self) -> float | None:
        if self._kind is OutputKind.LOGITS:
            return self._same_class / max(self._images, 1)
        if self._kind is OutputKind.DENSE or self._images < _MIN_NEIGHBOURS:
            return None
        references, outputs = (
            torch.cat(batches) for batches in zip(*self._embeddings, strict=True)
        )
        return float((_nearest(references) == _nearest(outputs)).double().mean())


def compare_outputs(
    references: list[Tensor], outputs: list[Tensor], embeddings: Iterable[int]
) -> tuple[OutputError, ...]:
    """Errors of a model's float outputs for one batch.

    Args:
        references: the outputs of the float model.
        outputs: the outputs of the quantized model.
        embeddings: positions of outputs ``(B, C)`` that are embeddings.
    """
    positions, errors = set(embeddings), []
    for i, (reference, output) in enumerate(zip(references, outputs, strict=True)):
        kind = kind_of(reference, embedding=i in positions)
        comparison = OutputComparison(output_name(i, len(references)), kind)
        comparison.add(reference, output)
        errors.append(comparison.result())
    return tuple(errors)


def output_name(position: int, count: int) -> str:
    """Name of one of ``count`` outputs in reports."""
    return "output" if count == 1 else f"output {position}"


def decibels(signal: float, noise: float) -> float:
    """Decibels of a signal's energy over the energy of its noise; infinite without noise."""
    if not noise:
        return math.inf
    ratio = signal / noise
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf


def _cosines(expected: Tensor, actual: Tensor) -> Tensor:
    """Cosine of each image ``(B,)``; 1 where both are zero, 0 where one is zero or not finite."""
    if not expected.numel():
        return torch.ones(len(expected))
    expected, actual = (value.reshape(len(value), -1) for value in (expected, actual))
    cosines = functional.cosine_similarity(expected, actual, dim=1, eps=1e-30)
    both_zero = ~(expected.any(1) | actual.any(1))
    return torch.where(both_zero, 1.0, cosines.nan_to_num(0.0))


def _nearest(embeddings: Tensor) -> Tensor:
    """Index of the nearest other image of each image by cosine, ``(N,)``."""
    unit = functional.normalize(embeddings.float(), dim=1)
    indices = []
    for start in range(0, len(unit), _NEIGHBOUR_CHUNK):
        rows = torch.arange(start, min(start + _NEIGHBOUR_CHUNK, len(unit)))
        cosines = unit[rows] @ unit.T
        cosines[torch.arange(len(rows)), rows] = -torch.inf
        indices.append(cosines.argmax(1))
    return torch.cat(indices)
