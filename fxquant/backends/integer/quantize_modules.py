"""Which module turns floats into the codes of a quantizer, and which turns them back."""

from __future__ import annotations

from torch import nn

from fxquant.backends.integer.log import LogFromCodes, LogToCodes
from fxquant.backends.integer.modules import FromCodes, ToCodes
from fxquant.backends.integer.products import IntegerQuantizer
from fxquant.backends.integer.twin import TwinFromCodes, TwinToCodes
from fxquant.quantizers import LogQuantizer, TwinUniformQuantizer


def to_codes(quantizer: IntegerQuantizer) -> nn.Module:
    """The module from floats to codes."""
    if isinstance(quantizer, TwinUniformQuantizer):
        return TwinToCodes(quantizer)
    return LogToCodes(quantizer) if isinstance(quantizer, LogQuantizer) else ToCodes(quantizer)


def from_codes(quantizer: IntegerQuantizer) -> nn.Module:
    """The module from codes to floats."""
    if isinstance(quantizer, TwinUniformQuantizer):
        return TwinFromCodes(quantizer)
    return LogFromCodes(quantizer) if isinstance(quantizer, LogQuantizer) else FromCodes(quantizer)
