"""Table of families: a row for each scheme, with all that is specific to it and needs torch.

A new scheme is a row here, a member of :class:`fxquant.config.spec.Scheme` with its limits, and a
quantizer class. Scale searches and backends have tables by class, in which a class without a row
has the row of its nearest base class; a class with a new kind of grid needs a row there. The limits
say for which specs and edges a scheme is, without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

from torch import Tensor

from fxquant.config.spec import Scheme, TensorSpec
from fxquant.errors import FileFormatError
from fxquant.quantizers.base import Quantizer
from fxquant.quantizers.candidates import (
    ADALOG_OCTAVES,
    focusing_candidates,
    log_candidates,
    twin_candidates,
)
from fxquant.quantizers.dynamic_focusing import DynamicFocusingQuantizer
from fxquant.quantizers.log import LogQuantizer
from fxquant.quantizers.power_of_two import PowerOfTwoQuantizer
from fxquant.quantizers.trained import (
    TrainedFocusing,
    TrainedQuantizer,
    TrainedTwin,
    TrainedUniform,
)
from fxquant.quantizers.twin_uniform import TwinUniformQuantizer
from fxquant.quantizers.uniform import UniformQuantizer

Entry = TypeVar("Entry")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Family: the quantizers of one scheme.

    Attributes:
        quantizer: class of the quantizers.
        label: short name of a spec in reports, shown behind its bit-width.
        fit: maps ``(lo, hi, spec, axis)`` to the quantizer that covers ``[lo, hi]``; the ends are
            tensors ``()``, or ``(C,)`` with an axis, and the quantizer is on the device of ``lo``.
        candidates: maps ``(lo, hi, spec, shares)`` to rows of quantizers for values in
            ``[lo, hi]``, from which fits on histograms and scale searches choose. Each has one
            scale for the tensor; quantizers with an axis are made by ``fit`` alone. None where
            each scale is searched on its own, by the parameters of :class:`UniformQuantizer`.
        trained: maps ``(quantizer, drop)`` to the form of the quantizer under training; None where
            scales of the scheme are not trained, which the report notes.
    """

    quantizer: type[Quantizer]
    label: Callable[[TensorSpec], str]
    fit: Callable[[Tensor, Tensor, TensorSpec, int | None], Quantizer]
    candidates: (
        Callable[[float, float, TensorSpec, Sequence[float]], Sequence[Sequence[Quantizer]]] | None
    ) = None
    trained: Callable[[Any, float], TrainedQuantizer] | None = None


def _log_family(octaves: Sequence[Fraction], label: str) -> Family:
    """Family of logarithmic quantizers whose codes are one of ``octaves`` apart."""

    def fit(lo: Tensor, hi: Tensor, spec: TensorSpec, axis: int | None) -> LogQuantizer:
        return LogQuantizer.reaching(float(hi), spec.bits, 1, 1).to(hi.device)

    return Family(
        quantizer=LogQuantizer,
        label=lambda spec: label,
        fit=fit,
        candidates=lambda lo, hi, spec, shares: log_candidates(hi, spec, shares, octaves),
    )


FAMILIES: dict[Scheme, Family] = {
    Scheme.UNIFORM: Family(
        quantizer=UniformQuantizer,
        label=lambda spec: "sym" if spec.symmetric else "asym",
        fit=UniformQuantizer.from_range,
        trained=TrainedUniform,
    ),
    Scheme.TWIN_UNIFORM: Family(
        quantizer=TwinUniformQuantizer,
        label=lambda spec: "twin",
        fit=lambda lo, hi, spec, axis: TwinUniformQuantizer.from_range(lo, hi, spec),
        candidates=lambda lo, hi, spec, shares: [twin_candidates(lo, hi, spec, shares)],
        trained=TrainedTwin,
    ),
    Scheme.DYNAMIC_FOCUSING: Family(
        quantizer=DynamicFocusingQuantizer,
        label=lambda spec: "focus",
        fit=DynamicFocusingQuantizer.from_range,
        candidates=lambda lo, hi, spec, shares: focusing_candidates(hi, spec, shares),
        trained=TrainedFocusing,
    ),
    Scheme.POWER_OF_TWO: Family(
        quantizer=PowerOfTwoQuantizer,
        label=lambda spec: "sym 2^n" if spec.symmetric else "asym 2^n",
        fit=PowerOfTwoQuantizer.from_range,
        trained=TrainedUniform,
    ),
    Scheme.LOG2: _log_family((Fraction(1),), "log2"),
    Scheme.ADALOG: _log_family(ADALOG_OCTAVES, "adalog"),
}


def entry_for(table: Mapping[type[Quantizer], Entry], quantizer: Quantizer) -> Entry | None:
    """A table's entry for the class of a quantizer, or for its nearest base class."""
    return next((table[kind] for kind in type(quantizer).__mro__ if kind in table), None)


def has_uniform_grid(spec: TensorSpec) -> bool:
    """Whether quantizers of a spec are uniform, so that :func:`uniform_class` has their class."""
    return issubclass(FAMILIES[spec.scheme].quantizer, UniformQuantizer)


def uniform_class(spec: TensorSpec) -> type[UniformQuantizer]:
    """The quantizer class of a spec that :func:`has_uniform_grid`."""
    quantizer = FAMILIES[spec.scheme].quantizer
    assert issubclass(quantizer, UniformQuantizer), f"{spec.scheme} has no uniform grid"
    return quantizer


def from_config(config: dict[str, object]) -> Quantizer:
    """Rebuilds a quantizer from its :meth:`Quantizer.config`.

    Raises:
        FileFormatError: the type is unknown to this version.
    """
    for family in FAMILIES.values():
        if family.quantizer.type_name == config.get("type"):
            return family.quantizer.from_config(config)
    raise FileFormatError(
        f"quantizer type {str(config.get('type'))!r} is unknown to this version of fxquant; "
        "upgrade fxquant or compile the model again",
        got=config.get("type"),
        expected=tuple(f.quantizer.type_name for f in FAMILIES.values()),
    )
