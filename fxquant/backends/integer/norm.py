"""LayerNorm and RMSNorm of integer codes in integers, by an integer square root.

With ``x = s d``, ``d = c - z`` and N values in a row, LayerNorm without its affine part is

    (x_i - mean) / sqrt(var + eps) = sqrt(N) u_i / sqrt(V + E)
    u_i = N d_i - sum d        V = sum u^2        E = N^3 eps / s^2

whose u and V are exact; RMSNorm has ``u = d`` and ``E = N eps / s^2``. Gamma, as whole numbers,
then multiplies the normalised values, and beta, as whole numbers, is added.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fxquant.backends.integer.requantize import WORD_BITS
from fxquant.errors import LoweringError
from fxquant.quantizers import AffineQuantizer

# Fraction bits of a normalised value, and bits of the largest gamma.
_FRACTION_BITS, _GAMMA_BITS = 16, 20


def int_sqrt(x: Tensor) -> Tensor:
    """Computes ``floor(sqrt(x))`` of int64 in 0 to ``2^62 - 1``, one bit of the root at a time."""
    root = torch.zeros_like(x)
    for bit in reversed(range(WORD_BITS // 2)):
        trial = root + (1 << bit)
        root = torch.where(trial * trial <= x, trial, root)
    return root


class IntNorm(nn.Module):
    """Maps codes to the output of a norm, as accumulators with one scale.

    Args:
        quantizer: quantizer of the input, per tensor.
        shape: sizes of the last axes, over which the norm runs, N values in all.
        weight: gamma, shaped as ``shape``, or None.
        bias: beta, shaped as ``shape``, or None.
        eps: constant added to the variance.
        centred: whether the mean is subtracted (LayerNorm) or not (RMSNorm).

    Raises:
        LoweringError: sums over a row could exceed 64 bits.
    """

    zero_point: Tensor
    gamma: Tensor | None
    beta: Tensor | None

    def __init__(
        self,
        quantizer: AffineQuantizer,
        shape: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        eps: float,
        centred: bool,
    ) -> None:
        super().__init__()
        self.axes, self.centred = tuple(range(-len(shape), 0)), centred
        self.count = n = math.prod(shape)
        span = quantizer.qmax - quantizer.qmin
        # The squared deviations of N values within a span from their mean sum to at most
        # N span^2 / 4.
        largest = n**3 * span**2 // 4 + 1 if centred else n * span**2
        self.floor = round((n**3 if centred else n) * eps / float(quantizer.scale) ** 2)
        room = WORD_BITS - (largest + self.floor).bit_length()
        if room < 0:
            raise LoweringError(
                f"a norm over {n} values of {quantizer.bits} bits needs sums of more than 64 bits; "
                "use fewer bits for its input",
                got=n,
            )
        self.room = room // 2
        reach = n * span if centred else span
        size = (reach * (math.isqrt(n) + 1)).bit_length()
        fraction = min(_FRACTION_BITS, WORD_BITS - 2 - size - self.room)
        self.gain = round(math.sqrt(n) * 2 ** (fraction + self.room))
        self.register_buffer("zero_point", quantizer.zero_point.to(torch.int64))
        unit = 2.0**-fraction
        self.bound = (math.isqrt(n) + 1) << fraction
        gamma = beta = None
        if weight is not None:
            step = (float(weight.abs().max()) or 1.0) / 2**_GAMMA_BITS
            gamma = torch.round(weight.double() / step).to(torch.int64)
            unit, self.bound = unit * step, self.bound << _GAMMA_BITS
        if bias is not None:
            beta = torch.round(bias.double() / unit).to(torch.int64)
            self.bound += int(beta.abs().max())
        self.scale = unit
        self.register_buffer("gamma", gamma)
        self.register_buffer("beta", beta)

    def forward(self, codes: Tensor) -> Tensor:
        """Norm of the values that ``codes`` represent, int64."""
        steps = codes.to(torch.int64) - self.zero_point
        if self.centred:
            steps = steps * self.count - steps.sum(self.axes, keepdim=True)
        power = (steps * steps).sum(self.axes, keepdim=True) + self.floor
        # A row of equal values without eps is zero over zero; the output is zero.
        root = int_sqrt(power << (2 * self.room)).clamp(min=1)
        out: Tensor = (2 * self.gain * steps + root).div(2 * root, rounding_mode="floor")
        if self.gamma is not None:
            out = out * self.gamma
        return out if self.beta is None else out + self.beta
