"""Frozen data that says how a tensor is to be quantized. No tensors live here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any

from fxquant.errors import BitWidthError, PolicyError, UnknownKeyError

MIN_BITS, MAX_BITS = 2, 16


class Stage(IntEnum):
    """What a graph has been through; ``gm.meta["stage"]``."""

    FLOAT = 0
    ANNOTATED = 1
    OBSERVED = 2
    FROZEN = 3


class OpKind(StrEnum):
    """Operations whose inputs can be quantized."""

    LINEAR = "linear"
    CONV = "conv"
    MATMUL = "matmul"


class Arg(StrEnum):
    """The role of a quantized input of an operation."""

    INPUT = "input"
    WEIGHT = "weight"
    LHS = "lhs"
    RHS = "rhs"


class Scheme(StrEnum):
    """Families of quantizers."""

    UNIFORM = "uniform"


class Granularity(StrEnum):
    """What shares one scale.

    The tensor; an output channel of a weight, or a channel of an activation (its last axis, axis 1
    at a convolution); or an attention head (axis -3 of a matmul operand).
    """

    TENSOR = "tensor"
    CHANNEL = "channel"
    HEAD = "head"


class ObserverKind(StrEnum):
    """How the range of a tensor is chosen."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    MSE = "mse"


def parse_field(item: Any, name: str, enum: type[StrEnum]) -> None:
    """Turns the plain string in a field of a frozen dataclass into the enum it stands for.

    Raises:
        UnknownKeyError: it stands for none.
    """
    value = getattr(item, name)
    if not isinstance(value, str) or value not in list(enum):
        raise UnknownKeyError(f"{name} must be one of {', '.join(enum)}, got {value!r}")
    object.__setattr__(item, name, enum(value))


def check_flag(item: Any, name: str) -> None:
    """Checks that a field is true or false.

    Raises:
        PolicyError: it is something else, such as the string ``"no"``.
    """
    value = getattr(item, name)
    if not isinstance(value, bool):
        raise PolicyError(f"{name} must be true or false, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """How one edge is quantized.

    Attributes:
        bits: bit-width of the codes, 2 to 16.
        scheme: family of the quantizer.
        symmetric: zero_point fixed at the middle of the code range, codes signed; otherwise
            codes are unsigned and the zero_point is fitted.
        granularity: what shares a scale.
        observer: how the range is fitted to the data.
        percentile: share of the values kept inside the range, in percent; read only by the
            percentile observer.
    """

    bits: int = 8
    scheme: Scheme = Scheme.UNIFORM
    symmetric: bool = False
    granularity: Granularity = Granularity.TENSOR
    observer: ObserverKind = ObserverKind.MINMAX
    percentile: float = 99.99

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            BitWidthError: bits is not an integer in 2..16.
            UnknownKeyError: scheme, granularity or observer is unknown.
            PolicyError: percentile is no number in (50, 100], or symmetric no boolean.
        """
        parse_field(self, "scheme", Scheme)
        parse_field(self, "granularity", Granularity)
        parse_field(self, "observer", ObserverKind)
        check_flag(self, "symmetric")
        if isinstance(self.bits, bool) or not isinstance(self.bits, int):
            raise BitWidthError(f"bits must be an integer, got {self.bits!r}")
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise BitWidthError(
                f"bits must be in {MIN_BITS}..{MAX_BITS}, got {self.bits}; "
                "to leave a tensor float, give the rule `spec: null`"
            )
        if isinstance(self.percentile, bool) or not isinstance(self.percentile, int | float):
            raise PolicyError(f"percentile must be a number, got {self.percentile!r}")
        if not 50 < self.percentile <= 100:
            raise PolicyError(f"percentile must be in (50, 100], got {self.percentile}")

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code, both included."""
        if self.symmetric:
            return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
        return 0, (1 << self.bits) - 1
