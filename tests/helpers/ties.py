"""How far apart two codes of a quantizer are, and how near a value lies to the border of both."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.quantizers import AffineQuantizer, LogQuantizer, TwinUniformQuantizer

IntegerQuantizer = AffineQuantizer | TwinUniformQuantizer | LogQuantizer


def places(quantizer: IntegerQuantizer, codes: Tensor) -> Tensor:
    """The place of each code's value among all values of the quantizer in ascending order."""
    if isinstance(quantizer, AffineQuantizer):
        return codes
    if isinstance(quantizer, LogQuantizer):
        return quantizer.zero_code - codes
    steps = (quantizer.dequantize(codes) / quantizer.scale).round().contiguous()
    magnitudes = torch.arange(quantizer.levels)
    coarse = magnitudes << quantizer.shift
    # The fine grid of a one-sided quantizer reaches as far as its first coarse value.
    first = 0 if quantizer.two_sided else quantizer.levels
    fine = -magnitudes if quantizer.two_sided else magnitudes
    grid = torch.cat([fine, coarse[coarse >= first]]).unique().float()
    assert bool(torch.isin(steps, grid).all()), "a code that the quantizer never gives"
    return torch.searchsorted(grid, steps)


def from_tie(quantizer: IntegerQuantizer, x: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Distance of ``x`` from half-way between the values of two codes, in units of their gap.

    Not a number where the codes are equal.
    """
    a, b = quantizer.dequantize(one), quantizer.dequantize(other)
    return (x - (a + b) / 2).abs() / (a - b).abs()
