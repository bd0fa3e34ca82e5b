"""Quantizers: all rounding; one class for each kind of grid, one family for each scheme."""

from fxquant.quantizers.affine import INT32_MAX, AffineQuantizer, accumulator_scale
from fxquant.quantizers.base import Quantizer
from fxquant.quantizers.dynamic_focusing import DynamicFocusingQuantizer, largest_start
from fxquant.quantizers.families import (
    FAMILIES,
    Family,
    entry_for,
    from_config,
    has_uniform_grid,
    uniform_class,
)
from fxquant.quantizers.log import LogQuantizer
from fxquant.quantizers.power_of_two import PowerOfTwoQuantizer
from fxquant.quantizers.twin_uniform import TwinUniformQuantizer, covering_shift
from fxquant.quantizers.uniform import UniformQuantizer

__all__ = [
    "FAMILIES",
    "INT32_MAX",
    "AffineQuantizer",
    "DynamicFocusingQuantizer",
    "Family",
    "LogQuantizer",
    "PowerOfTwoQuantizer",
    "Quantizer",
    "TwinUniformQuantizer",
    "UniformQuantizer",
    "accumulator_scale",
    "covering_shift",
    "entry_for",
    "from_config",
    "has_uniform_grid",
    "largest_start",
    "uniform_class",
]
