"""All the rounding there is."""

from __future__ import annotations

from fxquant.errors import FileFormatError
from fxquant.quantizers.base import Quantizer
from fxquant.quantizers.uniform import (
    INT32_MAX,
    UniformQuantizer,
    accumulator_scale,
    affine_parameters,
)

__all__ = [
    "INT32_MAX",
    "Quantizer",
    "UniformQuantizer",
    "accumulator_scale",
    "affine_parameters",
    "from_config",
]


def from_config(config: dict[str, object]) -> Quantizer:
    """Rebuilds a quantizer from its :meth:`Quantizer.config`.

    Raises:
        FileFormatError: the type is unknown to this version.
    """
    if config.get("type") != "uniform":
        raise FileFormatError(
            f"quantizer type {config.get('type')!r} is unknown to this version of fxquant; "
            "upgrade fxquant or compile the model again"
        )
    return UniformQuantizer.from_config(config)
