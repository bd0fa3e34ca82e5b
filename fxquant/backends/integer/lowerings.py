"""The table of lowerings: what the codes of each kind of quantizer become on integer kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fxquant.backends.integer.log import LogFromCodes, LogOperand, LogRequantize, LogToCodes
from fxquant.backends.integer.modules import AnyOperand, FromCodes, QuantizedOperand, ToCodes
from fxquant.backends.integer.requantize import Requantize, TwinRequantize
from fxquant.backends.integer.twin import TwinFromCodes, TwinOperand, TwinToCodes
from fxquant.quantizers import (
    AffineQuantizer,
    DynamicFocusingQuantizer,
    LogQuantizer,
    Quantizer,
    TwinUniformQuantizer,
    UniformQuantizer,
    entry_for,
)


class _MakeRequantize(Protocol):
    def __call__(
        self,
        quantizer: Any,
        ratio: Tensor,
        zero_point: Tensor,
        *,
        axis: int | None,
        bound: int,
        dtype: torch.dtype,
    ) -> nn.Module: ...


@dataclass(frozen=True, kw_only=True)
class IntegerLowering:
    """The modules that stand for one kind of quantizer.

    Attributes:
        to_codes: from the quantizer to the module from floats to codes.
        from_codes: from the quantizer to the module from codes to floats.
        operand: from the quantizer and the axis of its scale, as the product sees the operand, to
            the operand of a product.
        requantize: from the quantizer, the unit of the accumulators over its scale, its zero_point,
            the axis that either runs along, the bound of the accumulators and the type of the codes
            to the module from accumulators to codes.
    """

    to_codes: Callable[[Any], nn.Module]
    from_codes: Callable[[Any], nn.Module]
    operand: Callable[[Any, int | None], AnyOperand]
    requantize: _MakeRequantize


def _requantize_affine(
    quantizer: AffineQuantizer,
    ratio: Tensor,
    zero_point: Tensor,
    *,
    axis: int | None,
    bound: int,
    dtype: torch.dtype,
) -> Requantize:
    ends = quantizer.code_range
    return Requantize(ratio, zero_point, axis=axis, bound=bound, ends=ends, dtype=dtype)


def _requantize_twin(
    quantizer: TwinUniformQuantizer,
    ratio: Tensor,
    zero_point: Tensor,
    *,
    axis: int | None,
    bound: int,
    dtype: torch.dtype,
) -> TwinRequantize:
    return TwinRequantize(quantizer, ratio, axis=axis, bound=bound)


def _requantize_log(
    quantizer: LogQuantizer,
    ratio: Tensor,
    zero_point: Tensor,
    *,
    axis: int | None,
    bound: int,
    dtype: torch.dtype,
) -> LogRequantize:
    return LogRequantize(quantizer, ratio)


_AFFINE = IntegerLowering(
    to_codes=ToCodes,
    from_codes=FromCodes,
    operand=QuantizedOperand,
    requantize=_requantize_affine,
)
LOWERINGS: dict[type[Quantizer], IntegerLowering] = {
    UniformQuantizer: _AFFINE,
    DynamicFocusingQuantizer: _AFFINE,
    TwinUniformQuantizer: IntegerLowering(
        to_codes=TwinToCodes,
        from_codes=TwinFromCodes,
        operand=lambda quantizer, axis: TwinOperand(quantizer),
        requantize=_requantize_twin,
    ),
    LogQuantizer: IntegerLowering(
        to_codes=LogToCodes,
        from_codes=LogFromCodes,
        operand=lambda quantizer, axis: LogOperand(quantizer),
        requantize=_requantize_log,
    ),
}


def integer_form(quantizer: Quantizer) -> IntegerLowering:
    """The entry of a quantizer that is known to have one."""
    entry = entry_for(LOWERINGS, quantizer)
    assert entry is not None, f"{type(quantizer).__name__} has no integer form"
    return entry


def has_codes(module: nn.Module | None) -> bool:
    """Whether a module is a quantizer whose codes this backend multiplies."""
    return isinstance(module, Quantizer) and entry_for(LOWERINGS, module) is not None
