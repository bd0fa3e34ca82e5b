"""Specification of how a tensor is quantized. Frozen data without tensors."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from fxquant.config.validation import (
    check_flag,
    check_number,
    is_whole,
    parse_field,
)
from fxquant.errors import BitWidthError, PolicyError

MIN_BITS, MAX_BITS = 2, 16
# Integer kernels have codes of up to 8 bits.
MAX_KERNEL_BITS = 8
# D_R1 of the twin scheme reaches down to D_R2 / 2^11 (arXiv 2111.12293, section 4.2). A finer one
# would be the unit of accumulators that biases overflow.
MAX_SHIFT = 11


class Scheme(StrEnum):
    """Families of quantizers; :mod:`fxquant.quantizers.families` has a row for each.

    ``power_of_two`` is ``uniform`` with scales ``2^n``. ``dynamic_focusing``, ``log2`` and
    ``adalog`` are for values from zero up that a linear or matmul reads, such as softmax outputs.
    """

    UNIFORM = "uniform"
    TWIN_UNIFORM = "twin_uniform"
    DYNAMIC_FOCUSING = "dynamic_focusing"
    LOG2 = "log2"
    ADALOG = "adalog"
    POWER_OF_TWO = "power_of_two"

    @property
    def limits(self) -> SchemeLimits:
        """The specs and edges that the scheme is for."""
        return _LIMITS[self]


@dataclass(frozen=True, kw_only=True)
class SchemeLimits:
    """The specs and edges that a scheme is for.

    Without a flag a scheme is asymmetric, per tensor, and for the activations that a product reads.

    Attributes:
        allows_symmetric: symmetric specs too.
        allows_finer: a scale for each channel or head too.
        allows_weights: weights too; the class of its quantizers derives from ``UniformQuantizer``.
        allows_elementwise: inputs of norms, softmax, activation functions and additions too.
        is_one_sided: without codes for values below zero.
        has_regions: of two regions of different step, so that ``max_shift`` bounds their ratio and
            OPT-m searches it.
        max_bits: largest bit-width.
    """

    allows_symmetric: bool = False
    allows_finer: bool = False
    allows_weights: bool = False
    allows_elementwise: bool = False
    is_one_sided: bool = False
    has_regions: bool = False
    max_bits: int = MAX_KERNEL_BITS


_EVERY_SPEC_AND_EDGE = SchemeLimits(
    allows_symmetric=True,
    allows_finer=True,
    allows_weights=True,
    allows_elementwise=True,
    max_bits=MAX_BITS,
)
_LIMITS = {
    Scheme.UNIFORM: _EVERY_SPEC_AND_EDGE,
    Scheme.TWIN_UNIFORM: SchemeLimits(has_regions=True),
    Scheme.DYNAMIC_FOCUSING: SchemeLimits(is_one_sided=True),
    Scheme.LOG2: SchemeLimits(is_one_sided=True),
    Scheme.ADALOG: SchemeLimits(is_one_sided=True),
    Scheme.POWER_OF_TWO: _EVERY_SPEC_AND_EDGE,
}


class Granularity(StrEnum):
    """Values that share one scale.

    The whole tensor; an output channel of a weight, or a channel of an activation (its last axis,
    axis 1 at a convolution); or an attention head (axis -3 of a matmul operand).
    """

    TENSOR = "tensor"
    CHANNEL = "channel"
    HEAD = "head"


class ObserverKind(StrEnum):
    """Method of fitting the range of a tensor to data.

    ``softmax`` is for what a softmax reads along its last axis: all values but those so far below
    the largest of their row that nothing is left of them.
    """

    MINMAX = "minmax"
    SOFTMAX = "softmax"
    PERCENTILE = "percentile"
    MSE = "mse"


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Quantization of one edge.

    Attributes:
        bits: bit-width of the codes, 2 to 16.
        scheme: family of the quantizer.
        symmetric: zero_point fixed at the middle of the code range, codes signed; otherwise
            codes are unsigned and the zero_point is fitted.
        granularity: what shares a scale.
        observer: how the range is fitted to the data.
        percentile: of the percentile observer: share of the values kept inside the range, in
            percent; None for 99.99.
        max_shift: of the twin scheme: largest m in ``D_R2 = 2^m D_R1``, 1 to 11; None for 11. A
            small one keeps all values on one 8-bit grid, so that a product needs one pass.
    """

    bits: int = 8
    scheme: Scheme = Scheme.UNIFORM
    symmetric: bool = False
    granularity: Granularity = Granularity.TENSOR
    observer: ObserverKind = ObserverKind.MINMAX
    percentile: float | None = None
    max_shift: int | None = None

    def __post_init__(self) -> None:
        """Refuses values that no quantizer can have.

        Raises:
            BitWidthError: bits is not an integer in 2..16.
            UnknownKeyError: scheme, granularity or observer is unknown.
            PolicyError: percentile is not a number in (50, 100], or another observer has one;
                symmetric is not a boolean; or the scheme does not allow the other values.
        """
        parse_field(self, "scheme", Scheme)
        parse_field(self, "granularity", Granularity)
        parse_field(self, "observer", ObserverKind)
        check_flag(self, "symmetric")
        if not is_whole(self.bits):
            raise BitWidthError(
                f"bits must be an integer, got {self.bits!r}", got=self.bits, expected=int
            )
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise BitWidthError(
                f"bits must be in {MIN_BITS}..{MAX_BITS}, got {self.bits}; "
                "to leave a tensor float, give the rule `spec: null`",
                got=self.bits,
                expected=f"{MIN_BITS}..{MAX_BITS}",
            )
        self._check_percentile()
        self._check_shift()
        self._check_limits()

    def _check_percentile(self) -> None:
        if self.percentile is None:
            return
        check_number(self, "percentile")
        if not 50 < self.percentile <= 100:
            raise PolicyError(
                f"percentile must be in (50, 100], got {self.percentile}",
                got=self.percentile,
                expected="(50, 100]",
            )
        if self.observer is not ObserverKind.PERCENTILE:
            raise PolicyError(
                "percentile belongs to observer percentile alone, and the observer is "
                f"{self.observer}: name that observer, or leave percentile out",
                got=self.observer,
                expected=ObserverKind.PERCENTILE,
            )

    def _check_shift(self) -> None:
        shift = self.max_shift
        if shift is None:
            return
        if not is_whole(shift):
            raise PolicyError(
                f"max_shift must be a whole number or null, got {shift!r}",
                got=shift,
                expected="a whole number or null",
            )
        if not self.scheme.limits.has_regions:
            raise PolicyError(
                "max_shift belongs to scheme twin_uniform alone",
                got=self.scheme,
                expected=Scheme.TWIN_UNIFORM,
            )
        if not 1 <= shift <= MAX_SHIFT:
            raise PolicyError(
                f"max_shift must be in 1..{MAX_SHIFT}, got {shift}",
                got=shift,
                expected=f"1..{MAX_SHIFT}",
            )

    def _check_limits(self) -> None:
        limits = self.scheme.limits
        if self.bits > limits.max_bits:
            raise BitWidthError(
                f"scheme {self.scheme} takes {MIN_BITS} to {limits.max_bits} bits, got {self.bits}",
                got=self.bits,
                expected=f"{MIN_BITS}..{limits.max_bits}",
            )
        wrongly_symmetric = self.symmetric and not limits.allows_symmetric
        is_finer = self.granularity is not Granularity.TENSOR
        if not wrongly_symmetric and not (is_finer and not limits.allows_finer):
            return
        if not (limits.allows_symmetric or limits.allows_finer):
            raise PolicyError(
                f"scheme {self.scheme} is neither symmetric nor finer than per tensor: leave out "
                "`symmetric` and `granularity`",
                got=(self.symmetric, self.granularity),
                expected=(False, Granularity.TENSOR),
            )
        if limits.allows_finer:
            raise PolicyError(
                f"scheme {self.scheme} is not symmetric: leave out `symmetric`",
                got=self.symmetric,
                expected=False,
            )
        raise PolicyError(
            f"scheme {self.scheme} is not finer than per tensor: leave out `granularity`",
            got=self.granularity,
            expected=Granularity.TENSOR,
        )

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code, both included."""
        if self.symmetric:
            return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
        return 0, (1 << self.bits) - 1
