"""Outputs of a runtime compared with those of another one, without labels."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fxquant.cli.evaluation import Runtime, check_images
from fxquant.compiled.output_errors import (
    OutputComparison,
    OutputError,
    OutputKind,
    kind_of,
    output_name,
)
from fxquant.errors import ModelError
from fxquant.graph.outputs import float_outputs
from fxquant.utils.progress import track


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Errors of a runtime's outputs.

    Attributes:
        name: name of the runtime.
        reference: name of the runtime that it is compared with.
        images: number of images.
        seconds: time in the runtime, without the reference.
        outputs: error of each float output.
    """

    name: str
    reference: str
    images: int
    seconds: float
    outputs: tuple[OutputError, ...]

    def __str__(self) -> str:
        """A line with names and speed, and a line for each output."""
        head = (
            f"{self.name} against {self.reference}: {self.images} images, "
            f"{self.images / self.seconds:.1f} images/s"
        )
        return "\n".join([head, *(f"  {error}" for error in self.outputs)])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "runtime": self.name,
            "reference": self.reference,
            "images": self.images,
            "images_per_second": self.images / self.seconds,
            "outputs": [error.to_dict() for error in self.outputs],
        }


def kinds_of(
    outputs: Sequence[Tensor], choice: str, recorded: Sequence[OutputKind]
) -> tuple[OutputKind, ...]:
    """The kind of each float output.

    Args:
        outputs: the outputs of a batch.
        choice: ``logits`` or ``features`` as the user says, or ``auto``: as recorded and, where
            nothing is recorded, outputs ``(B, C)`` are logits.
        recorded: kinds from the report of the compiled model, empty where there is none.
    """
    values = float_outputs(list(outputs))
    fits = choice == "auto" and len(recorded) == len(values)
    return tuple(
        kind_of(
            value,
            embedding=choice == "features" or (fits and recorded[i] is OutputKind.EMBEDDING),
        )
        for i, value in enumerate(values)
    )


def compare(
    runtime: Runtime,
    reference: Runtime,
    data: Iterable[tuple[Tensor, Tensor]],
    kinds: Sequence[OutputKind],
    count: int = 0,
) -> Comparison:
    """Compares the outputs of all batches.

    Args:
        runtime: runtime to measure.
        reference: runtime of the float model.
        data: batches of images and labels, which are not used.
        kinds: kind of each float output of the runtime.
        count: number of batches, for progress; 0 if unknown.

    Raises:
        DataError: the images do not fit a model.
        ModelError: the two models have other outputs, or none is a float tensor.
    """
    comparisons = [
        OutputComparison(output_name(i, len(kinds)), kind) for i, kind in enumerate(kinds)
    ]
    number, seconds = 0, 0.0
    for images, _ in track(data, label=runtime.name, total=count):
        check_images(runtime, images)
        check_images(reference, images)
        start = time.perf_counter()
        outputs = float_outputs(list(runtime.run(images)))
        seconds += time.perf_counter() - start
        expected = float_outputs(list(reference.run(images)))
        _check_outputs(runtime, reference, outputs, expected)
        for comparison, *pair in zip(comparisons, expected, outputs, strict=True):
            comparison.add(*pair)
        number += len(images)
    errors = tuple(comparison.result() for comparison in comparisons)
    return Comparison(
        name=runtime.name,
        reference=reference.name,
        images=number,
        seconds=seconds,
        outputs=errors,
    )


def _check_outputs(
    runtime: Runtime, reference: Runtime, outputs: list[Tensor], expected: list[Tensor]
) -> None:
    shapes, other_shapes = ([tuple(x.shape) for x in values] for values in (outputs, expected))
    if not outputs:
        raise ModelError(f"{runtime.name} has no float output that could be compared")
    if shapes != other_shapes:
        raise ModelError(
            f"{runtime.name} has outputs of shapes {shapes}, {reference.name} of shapes "
            f"{other_shapes}; --reference must be the float form of the same model: check "
            "--model-arg (for example num_classes)",
            got=shapes,
            expected=other_shapes,
        )
