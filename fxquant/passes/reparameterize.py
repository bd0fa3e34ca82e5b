"""Moves every channel behind a norm onto one common range.

Before: ``W y + b`` with ``y_j`` in ``[lo_j, hi_j]``
After:  ``W' y' + b'`` with ``y'_j = (y_j - shift_j) / divide_j`` in ``[lo, hi]``, the same for all

One scale for the tensor then serves every channel as well as a scale each would. RepQ-ViT (arXiv
2212.08254, eq. 6 to 8) turns scales ``s`` and zero points ``z`` a channel into their means with
``r1 = s / mean(s)`` and ``r2 = z - mean(z)``: ``divide = r1``, ``shift = -s r2``. The fold is
exact for any values, so zero points are not rounded here, and the bit-width drops out: with widths
``w = hi - lo`` and middles ``m``, ``divide = w / mean(w)``, and ``shift`` takes each middle to
``mean(m / w) mean(w)``, held so close to zero that zero stays in the range, where any quantizer
keeps it.

- A site that cannot shift (zeros are padded, an rms norm) is divided so that the largest magnitude
  of every channel becomes their mean.
- A channel that hardly varies would ask for a division by almost nothing. It is left out of the
  means and, where that can be, shifted to zero, so that its constant goes into the bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxquant.config.vocabulary import Stage
from fxquant.passes.base import PassResult, skipped
from fxquant.smoothing.affine_fold import fold
from fxquant.smoothing.fold_sites import norm_sites

# Widths below this part of the mean width count as none: a channel as narrow as that loses less
# than half a step of an 8-bit quantizer if it is taken for a constant.
_NARROW = 1e-3
# Ranges closer to the common one than this part of it are left alone: measured in float32, those of
# channels far from zero are known no better.
_SAME = 1e-4


@dataclass(frozen=True)
class Reparameterize:
    """See the module's text.

    Attributes:
        ranges: smallest and largest values ``(C,)`` of each norm, by its name; from
            :func:`fxquant.smoothing.norm_ranges.norm_ranges` on this graph.
    """

    ranges: Mapping[str, tuple[Tensor, Tensor]]
    requires: ClassVar[Stage] = Stage.FLOAT
    ensures: ClassVar[Stage] = Stage.FLOAT

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        """Folds at every site whose channels differ in their ranges."""
        changed, notes = 0, []
        for norm, site in list(norm_sites(gm)):
            if isinstance(site, str):
                notes.append(skipped(norm.name, f"the norm stays: {site}"))
            elif norm.name not in self.ranges:
                notes.append(skipped(norm.name, "the norm stays: its ranges were not measured"))
            else:
                lo, hi = (bound.double() for bound in self.ranges[norm.name])
                common = _onto_common_range(lo, hi) if site.shiftable else _scaled(lo, hi)
                if common is not None:
                    fold(gm, site, *common)
                    changed += 1
        gm.graph.eliminate_dead_code()
        gm.delete_all_unused_submodules()
        return PassResult(changed, tuple(notes))


def _onto_common_range(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor] | None:
    """``(divide, shift)``, None where they would change nothing."""
    width, middle = hi - lo, (hi + lo) / 2
    varies = width > _NARROW * width.mean()
    if not bool(varies.any()):
        return None
    mean = width[varies].mean()
    divide = torch.where(varies, width / mean, 1.0)
    target = ((middle / width)[varies].mean() * mean).clamp(-mean / 2, mean / 2)
    shift = middle - torch.where(varies, target * divide, 0.0)
    same = ((divide - 1).abs() < _SAME) & (shift.abs() < _SAME * mean)
    return None if bool(same.all()) else (divide, shift)


def _scaled(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor] | None:
    """``(divide, zeros)``, None where they would change nothing."""
    peak = torch.maximum(hi.abs(), lo.abs())
    varies = peak > _NARROW * peak.mean()
    if not bool(varies.any()):
        return None
    divide = torch.where(varies, peak / peak[varies].mean(), 1.0)
    same = (divide - 1).abs() < _SAME
    return None if bool(same.all()) else (divide, torch.zeros_like(divide))
