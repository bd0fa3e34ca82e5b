"""Maps every channel of a norm's output onto one common range.

Before: ``W y + b`` with ``y_j`` in ``[lo_j, hi_j]``
After:  ``W' y' + b'`` with ``y'_j = (y_j - shift_j) / divide_j`` in ``[lo, hi]``, the same for all

One scale for the tensor then fits every channel as well as one scale per channel. RepQ-ViT (arXiv
2212.08254, eq. 6 to 8) turns scales ``s`` and zero points ``z`` per channel into their means with
``r1 = s / mean(s)`` and ``r2 = z - mean(z)``: ``divide = r1``, ``shift = -s r2``. The fold is
exact for any values: zero points are not rounded here, and the bit-width drops out. With widths
``w = hi - lo`` and middles ``m``, ``divide = w / mean(w)``, and ``shift`` maps each middle to
``mean(m / w) mean(w)``, clamped to half a width around zero: zero stays in the range, as every
quantizer requires.

- A site that cannot shift (zeros are padded, an rms norm) is divided in such a way that the largest
  magnitude of every channel becomes the mean of these magnitudes.
- A channel that hardly varies would need a division by almost zero. Such a channel is left out of
  the means and, where a shift is possible, is shifted to zero: its constant moves to the bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxquant.config.vocabulary import Stage
from fxquant.passes.base import PassResult, Refusal, skipped
from fxquant.smoothing.affine_fold import fold
from fxquant.smoothing.channel_ranges import ChannelRanges
from fxquant.smoothing.fold_sites import norm_sites

# A channel whose width is below this share of the mean width counts as constant, which costs less
# than half a step of an 8-bit quantizer.
_CONSTANT_WIDTH_RATIO = 1e-3
# Ranges within this share of the common range are not changed: float32 measures the range of a
# channel far from zero no more accurately.
_RANGE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Reparameterize:
    """Folds a scale and a shift per channel into each norm and the products that read it.

    Attributes:
        ranges: smallest and largest values ``(C,)`` of each norm, by its name; from
            :func:`fxquant.smoothing.channel_ranges.norm_ranges` on this graph.
    """

    ranges: ChannelRanges
    requires: ClassVar[Stage] = Stage.FLOAT
    ensures: ClassVar[Stage] = Stage.FLOAT

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        """Folds at every site whose channels differ in their ranges."""
        changed, notes = 0, []
        for norm, site in list(norm_sites(gm)):
            if isinstance(site, Refusal):
                notes.append(skipped(norm.name, f"the norm stays: {site}"))
            elif norm.name not in self.ranges:
                notes.append(skipped(norm.name, "the norm stays: its ranges were not measured"))
            else:
                lo, hi = (bound.double() for bound in self.ranges[norm.name])
                mapping = _onto_common_range(lo, hi) if site.shiftable else _scaled(lo, hi)
                if mapping is not None:
                    fold(gm, site, *mapping)
                    changed += 1
        gm.graph.eliminate_dead_code()
        gm.delete_all_unused_submodules()
        return PassResult(changed, tuple(notes))


def _onto_common_range(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor] | None:
    """``(divide, shift)`` of a site that can shift; None where they would change nothing."""
    width, middle = hi - lo, (hi + lo) / 2
    varies = width > _CONSTANT_WIDTH_RATIO * width.mean()
    if not bool(varies.any()):
        return None
    mean = width[varies].mean()
    divide = torch.where(varies, width / mean, 1.0)
    target = ((middle / width)[varies].mean() * mean).clamp(-mean / 2, mean / 2)
    shift = middle - torch.where(varies, target * divide, 0.0)
    same = ((divide - 1).abs() < _RANGE_TOLERANCE) & (shift.abs() < _RANGE_TOLERANCE * mean)
    return None if bool(same.all()) else (divide, shift)


def _scaled(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor] | None:
    """``(divide, zeros)`` of a site that cannot shift; None where they would change nothing."""
    peak = torch.maximum(hi.abs(), lo.abs())
    varies = peak > _CONSTANT_WIDTH_RATIO * peak.mean()
    if not bool(varies.any()):
        return None
    divide = torch.where(varies, peak / peak[varies].mean(), 1.0)
    same = (divide - 1).abs() < _RANGE_TOLERANCE
    return None if bool(same.all()) else (divide, torch.zeros_like(divide))
