"""How far two runs of one network lie apart, and how far rounding alone may part them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Outputs = Sequence[NDArray[np.generic]]

# A rounding tie moves a code by one now and then, which a deep network carries to its end; a
# wrong fusion changes the output by more than this share of its norm.
TOLERANCE = 0.05
# Inner values are about 1, so that float32 leaves 1e-6, TOLERANCE of this, where zero is right.
SMALLEST = 2e-5
# Share of the images' size that their noise has: enough for some codes to round otherwise.
_NOISE = 1e-5
# One draw of noise tells the size of what ties do, not its largest value.
_MARGIN = 3.0
# Numbers of another image, or none at all, differ by more.
_MOST = 0.4


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What two runs of one network differ by.

    Attributes:
        found: L2 norm of the outputs' difference over that of the outputs.
        ties: how much codes that round otherwise move the outputs, in the same unit; 0, not
            measured, where ``found`` is at most ``TOLERANCE``.
    """

    found: float
    ties: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether rounding explains it."""
        return self.found <= max(TOLERANCE, min(_MARGIN * self.ties, _MOST))

    def __str__(self) -> str:
        """A number, and what explains it where it is large."""
        if not self.ties:
            return f"{self.found:.1e}"
        return f"{self.found:.1e} (codes that round otherwise move the outputs by {self.ties:.1e})"


def compare(
    values: Outputs,
    plain: Outputs,
    images: NDArray[np.generic],
    run: Callable[[NDArray[np.generic]], Outputs],
) -> Difference:
    """The difference of all outputs together.

    Args:
        values: of one run.
        plain: of the other.
        images: what gave both.
        run: the outputs of images; where the two differ by more than ``TOLERANCE``, it runs once
            more, on images with noise.
    """
    expected = _joined(plain)
    found = relative_difference(_joined(values), expected)
    if found <= TOLERANCE or not np.issubdtype(images.dtype, np.floating):
        return Difference(found=found)
    size = np.sqrt(np.mean(images.astype(np.float64) ** 2))
    noise = np.random.default_rng(0).standard_normal(images.shape) * (_NOISE * size)
    moved = _joined(run((images + noise).astype(images.dtype)))
    return Difference(found=found, ties=relative_difference(moved, expected))


def relative_difference(values: NDArray[np.float64], plain: NDArray[np.float64]) -> float:
    """L2 norm of the difference over that of the finite plain values.

    Equal infinities agree, and so do two NaN. Of outputs below ``SMALLEST`` the difference is
    taken relative to that.

    Args:
        values: of any shape.
        plain: what they should be, of the same.
    """
    differ = (values != plain) & ~(np.isnan(values) & np.isnan(plain))
    gap = np.subtract(values, plain, out=np.zeros_like(plain), where=differ)
    size = float(np.linalg.norm(plain[np.isfinite(plain)]))
    return float(np.linalg.norm(gap)) / max(size, SMALLEST)


def _joined(outputs: Outputs) -> NDArray[np.float64]:
    return np.concatenate([np.ravel(output).astype(np.float64) for output in outputs])
