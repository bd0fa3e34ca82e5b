"""Table of lowerings: the integer modules of each kind of quantizer."""

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
    """Lowering of one kind of quantizer: functions that make its integer modules.

    Attributes:
        to_codes: makes, of the quantizer, the module that maps floats to codes.
        from_codes: makes, of the quantizer, the module that maps codes to floats.
        operand: makes the operand of a product, of the quantizer and of the axis of its scale as
            the product reads the operand.
        requantize: makes the module that maps accumulators to codes, of the quantizer, the unit of
            the accumulators over its scale, its zero_point, the axis that the ratio or the
            zero_point runs along, the bound of the accumulators and the type of the codes. None
            where accumulators cannot become such codes: the graph is then lowered with floats
            between its products, and ``meta["float_because"]`` names the quantizer.
    """

    to_codes: Callable[[Any], nn.Module]
    from_codes: Callable[[Any], nn.Module]
    operand: Callable[[Any, int | None], AnyOperand]
    requantize: _MakeRequantize | None = None


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
    """The table's entry of a quantizer that :func:`has_codes`."""
    entry = entry_for(LOWERINGS, quantizer)
    assert entry is not None, f"{type(quantizer).__name__} has no integer form"
    return entry


def has_codes(module: nn.Module | None) -> bool:
    """Whether a module is a quantizer with an entry in the table."""
    return isinstance(module, Quantizer) and entry_for(LOWERINGS, module) is not None
