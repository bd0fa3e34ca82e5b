"""Difference between two runs of one network, and the difference that rounding ties explain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Outputs = Sequence[NDArray[np.generic]]

# A rounding tie sometimes moves a code by one, which a deep network propagates to its outputs; a
# wrong fusion changes the outputs by more than this share of their norm.
TOLERANCE = 0.05
# Norm below which differences are absolute. Inner values are about 1, so that float32 computes
# 1e-6, TOLERANCE of this norm, where zero is right.
SMALLEST_NORM = 2e-5
# Norm of the noise, as a share of the images' norm: enough for some codes to round differently.
_NOISE_SHARE = 1e-5
# Factor on the effect of ties: one draw of noise measures its size, not its largest value.
_TIES_MARGIN = 3.0
# Largest difference that ties may explain. Outputs of another image, or zeros, differ by more.
_MAX_EXPLAINED = 0.4


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Difference between the outputs of two runs of one network.

    Attributes:
        relative_l2: L2 norm of the outputs' difference over the L2 norm of the outputs.
        ties: change of the outputs by codes that round differently, in the same unit; 0, not
            measured, where ``relative_l2`` is at most ``TOLERANCE``.
    """

    relative_l2: float
    ties: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether rounding explains the difference."""
        return self.relative_l2 <= max(TOLERANCE, min(_TIES_MARGIN * self.ties, _MAX_EXPLAINED))

    def __str__(self) -> str:
        """The difference as text, with the effect of rounding ties where it was measured."""
        if not self.ties:
            return f"{self.relative_l2:.1e}"
        ties = f"codes that round differently move the outputs by {self.ties:.1e}"
        return f"{self.relative_l2:.1e} ({ties})"


def compare(
    values: Outputs,
    reference: Outputs,
    images: NDArray[np.generic],
    run: Callable[[NDArray[np.generic]], Outputs],
) -> Difference:
    """Compares all outputs of two runs together.

    Args:
        values: outputs of the run to check.
        reference: outputs of the reference run.
        images: input of both runs.
        run: computes the reference outputs of images; called once, on images with noise, where
            the runs differ by more than ``TOLERANCE``.
    """
    expected = _joined(reference)
    relative_l2 = relative_difference(_joined(values), expected)
    if relative_l2 <= TOLERANCE or not np.issubdtype(images.dtype, np.floating):
        return Difference(relative_l2=relative_l2)
    root_mean_square = np.sqrt(np.mean(images.astype(np.float64) ** 2))
    noise = np.random.default_rng(0).standard_normal(images.shape) * (
        _NOISE_SHARE * root_mean_square
    )
    perturbed = _joined(run((images + noise).astype(images.dtype)))
    return Difference(relative_l2=relative_l2, ties=relative_difference(perturbed, expected))


def relative_difference(values: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    """L2 norm of the difference over the L2 norm of the finite reference values.

    Equal infinities agree, and two NaN agree. Where the norm of the reference is below
    ``SMALLEST_NORM``, the difference is relative to ``SMALLEST_NORM``.

    Args:
        values: values of any shape.
        reference: values to compare with, of the same shape.
    """
    differ = (values != reference) & ~(np.isnan(values) & np.isnan(reference))
    gap = np.subtract(values, reference, out=np.zeros_like(reference), where=differ)
    size = float(np.linalg.norm(reference[np.isfinite(reference)]))
    return float(np.linalg.norm(gap)) / max(size, SMALLEST_NORM)


def _joined(outputs: Outputs) -> NDArray[np.float64]:
    return np.concatenate([np.ravel(output).astype(np.float64) for output in outputs])
