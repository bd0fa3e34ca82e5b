"""All the rounding there is."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fxquant.errors import FileFormatError
from fxquant.quantizers.base import Quantizer
from fxquant.quantizers.dynamic_focusing import DynamicFocusingQuantizer, largest_start
from fxquant.quantizers.log import LogQuantizer
from fxquant.quantizers.twin_uniform import TwinUniformQuantizer, covering_shift
from fxquant.quantizers.uniform import INT32_MAX, UniformQuantizer, affine_parameters

__all__ = [
    "INT32_MAX",
    "DynamicFocusingQuantizer",
    "LogQuantizer",
    "Quantizer",
    "TwinUniformQuantizer",
    "UniformQuantizer",
    "accumulator_scale",
    "affine_parameters",
    "covering_shift",
    "from_config",
    "largest_start",
]

_TYPES: dict[str, Callable[[dict[str, object]], Quantizer]] = {
    "uniform": UniformQuantizer.from_config,
    "twin_uniform": TwinUniformQuantizer.from_config,
    "dynamic_focusing": DynamicFocusingQuantizer.from_config,
    "log": LogQuantizer.from_config,
}


def accumulator_scale(
    activation: UniformQuantizer | TwinUniformQuantizer, weight: UniformQuantizer
) -> Tensor:
    """Unit of the int32 accumulator of a product: ``s_x s_w``, of a twin ``D_R1 s_w``.

    Args:
        activation: per tensor.
        weight: per tensor, or per output channel on axis 0.

    Returns:
        float32, ``()`` or ``(N,)``.
    """
    return activation.scale * weight.scale


def from_config(config: dict[str, object]) -> Quantizer:
    """Rebuilds a quantizer from its :meth:`Quantizer.config`.

    Raises:
        FileFormatError: the type is unknown to this version.
    """
    kind = str(config.get("type"))
    if kind not in _TYPES:
        raise FileFormatError(
            f"quantizer type {kind!r} is unknown to this version of fxquant; "
            "upgrade fxquant or compile the model again"
        )
    return _TYPES[kind](config)
