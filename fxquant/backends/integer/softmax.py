"""Softmax of integer codes in integers: a table of exponentials and one division for each value.

    softmax(x)_i = E[c_max - c_i] / sum_j E[c_max - c_j]        E[d] = round(exp(-s d) 2^30)

where ``x = s (c - z)``: the zero point cancels, and the distances of codes from their row's maximum
are indices of a table that is at most as long as the range of codes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxquant.quantizers import AffineQuantizer

# Fraction bits of the table's exponentials and of the shares.
TABLE_BITS, SHARE_BITS = 30, 24


def exp_table(scale: float, size: int) -> Tensor:
    """Table of ``round(exp(-scale d) 2^30)`` for ``d`` in ``0..size-1``, int64."""
    distance = torch.arange(size, dtype=torch.float64) * scale
    return torch.round(torch.exp(-distance) * 2.0**TABLE_BITS).to(torch.int64)


def int_softmax(codes: Tensor, table: Tensor, axis: int) -> Tensor:
    """Softmax along an axis, in units of ``2^-24``, int64.

    Args:
        codes: integers whose largest difference along the axis is below ``len(table)``.
        table: the table of :func:`exp_table`.
        axis: axis of ``n`` values along which shares sum to one.

    Returns:
        Shares of the shape of ``codes``, within ``(n + 1) 2^-31 + 2^-25`` of the exact shares.
    """
    distance = (codes.amax(axis, keepdim=True).to(torch.int64)) - codes
    shares = table[distance]
    total = shares.sum(axis, keepdim=True)
    return ((shares << (SHARE_BITS + 1)) + total).div(2 * total, rounding_mode="floor")


class IntSoftmax(nn.Module):
    """Computes the softmax of codes as shares in units of ``2^-24``.

    Args:
        quantizer: quantizer of the input, per tensor.
        axis: axis along which shares sum to one.
    """

    table: Tensor

    def __init__(self, quantizer: AffineQuantizer, axis: int) -> None:
        super().__init__()
        self.axis = axis
        size = quantizer.qmax - quantizer.qmin + 1
        table = exp_table(float(quantizer.scale), size)
        self.register_buffer("table", table.to(quantizer.scale.device))

    @property
    def scale(self) -> float:
        """Unit of the shares."""
        return 2.0**-SHARE_BITS

    @property
    def bound(self) -> int:
        """Bound of the shares: 1, in their unit."""
        return 1 << SHARE_BITS

    def forward(self, codes: Tensor) -> Tensor:
        """Shares of ``codes``."""
        return int_softmax(codes, self.table, self.axis)
