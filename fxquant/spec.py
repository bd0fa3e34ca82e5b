"""Frozen data that says how a tensor is to be quantized. No tensors live here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum

from fxquant.checks import (
    check_flag,
    check_number,
    check_seed,
    check_whole,
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
# A step this much finer than the min-max one, at 2 to 16 bits, clips all but next to nothing.
LEAST_LOW = 1e-6


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
    LAYER_NORM = "layer_norm"
    RMS_NORM = "rms_norm"
    SOFTMAX = "softmax"
    ACTIVATION = "activation"
    ADD = "add"

    @property
    def is_product(self) -> bool:
        """Whether it multiplies two tensors; the others work value by value or row by row."""
        return self in _PRODUCTS


_PRODUCTS = (OpKind.LINEAR, OpKind.CONV, OpKind.MATMUL)


class Arg(StrEnum):
    """The role of a quantized input of an operation."""

    INPUT = "input"
    WEIGHT = "weight"
    LHS = "lhs"
    RHS = "rhs"


class End(StrEnum):
    """The ends of a network: products with none before them, and products with none after."""

    FIRST = "first"
    LAST = "last"


class Scheme(StrEnum):
    """Families of quantizers.

    The last three are for values from zero up that a linear or matmul reads, such as softmax gives.
    """

    UNIFORM = "uniform"
    TWIN_UNIFORM = "twin_uniform"
    DYNAMIC_FOCUSING = "dynamic_focusing"
    LOG2 = "log2"
    ADALOG = "adalog"

    @property
    def from_zero(self) -> bool:
        """Whether it has no codes for values below zero."""
        return self not in (Scheme.UNIFORM, Scheme.TWIN_UNIFORM)


class Granularity(StrEnum):
    """What shares one scale.

    The tensor; an output channel of a weight, or a channel of an activation (its last axis, axis 1
    at a convolution); or an attention head (axis -3 of a matmul operand).
    """

    TENSOR = "tensor"
    CHANNEL = "channel"
    HEAD = "head"


class ObserverKind(StrEnum):
    """How the range of a tensor is chosen.

    ``softmax`` is for what a softmax reads along its last axis: all values but those so far below
    the largest of their row that nothing is left of them.
    """

    MINMAX = "minmax"
    SOFTMAX = "softmax"
    PERCENTILE = "percentile"
    MSE = "mse"


class Metric(StrEnum):
    """What a search compares candidates by, in the output of the product.

    Formulas stand at ``search.metrics.losses``. Products of two activations are compared by
    ``hessian`` where ``fisher`` is asked for: a column of q kᵀ is another key in every image.
    """

    HESSIAN = "hessian"
    FISHER = "fisher"
    MSE = "mse"
    COSINE = "cosine"
    L1 = "l1"


# The metrics that need the gradient of a loss.
GRADIENT_METRICS = (Metric.HESSIAN, Metric.FISHER)


class GradientLoss(StrEnum):
    """The loss whose gradient weighs errors.

    Cross-entropy of the logits against the float model's own arg-max (the paper's), or against a
    label drawn from its softmax, whose expectation is the Fisher information. Both all but vanish
    for images that the model is sure of. ``margin``, the log-odds of the arg-max, has a gradient
    of the same order for every image. For outputs that are no logits: the squared distance to
    outputs moved by unit Gaussian noise, whose expectation is the Fisher information of a
    Gaussian (Gauss-Newton).
    """

    MARGIN = "margin"
    ARGMAX = "argmax"
    SAMPLED = "sampled"
    GAUSSIAN = "gaussian"


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
        """Checks the values.

        Raises:
            BitWidthError: bits is not an integer in 2..16.
            UnknownKeyError: scheme, granularity or observer is unknown.
            PolicyError: percentile is no number in (50, 100], or given to another observer,
                symmetric no boolean, or the scheme does not go with the other values.
        """
        parse_field(self, "scheme", Scheme)
        parse_field(self, "granularity", Granularity)
        parse_field(self, "observer", ObserverKind)
        check_flag(self, "symmetric")
        if not is_whole(self.bits):
            raise BitWidthError(f"bits must be an integer, got {self.bits!r}")
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise BitWidthError(
                f"bits must be in {MIN_BITS}..{MAX_BITS}, got {self.bits}; "
                "to leave a tensor float, give the rule `spec: null`"
            )
        self._check_percentile()
        self._check_shift()
        if self.scheme is not Scheme.UNIFORM:
            self._check_byte_scheme()

    def _check_percentile(self) -> None:
        if self.percentile is None:
            return
        check_number(self, "percentile")
        if not 50 < self.percentile <= 100:
            raise PolicyError(f"percentile must be in (50, 100], got {self.percentile}")
        if self.observer is not ObserverKind.PERCENTILE:
            raise PolicyError(
                "percentile belongs to observer percentile alone, and the observer is "
                f"{self.observer}: name that observer, or leave percentile out"
            )

    def _check_shift(self) -> None:
        shift = self.max_shift
        if shift is None:
            return
        if not is_whole(shift):
            raise PolicyError(f"max_shift must be a whole number or null, got {shift!r}")
        if self.scheme is not Scheme.TWIN_UNIFORM:
            raise PolicyError("max_shift belongs to scheme twin_uniform alone")
        if not 1 <= shift <= MAX_SHIFT:
            raise PolicyError(f"max_shift must be in 1..{MAX_SHIFT}, got {shift}")

    def _check_byte_scheme(self) -> None:
        if self.bits > MAX_KERNEL_BITS:
            raise BitWidthError(
                f"scheme {self.scheme} takes {MIN_BITS} to {MAX_KERNEL_BITS} bits, got {self.bits}"
            )
        if self.symmetric or self.granularity is not Granularity.TENSOR:
            raise PolicyError(
                f"scheme {self.scheme} is neither symmetric nor finer than per tensor: leave out "
                "`symmetric` and `granularity`"
            )

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code, both included."""
        if self.symmetric:
            return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
        return 0, (1 << self.bits) - 1


@dataclass(frozen=True, kw_only=True)
class ScaleSearch:
    """Search of scales by the output error of products (arXiv 2111.12293, section 4.3).

    Attributes:
        metric: how far a product is from the float one.
        loss: whose gradient the Hessian and the Fisher metric take.
        rounds: alternations between the operands of a product.
        candidates: points of the linear grid, n.
        low: its first point, as a share of the min-max scale (the paper's alpha).
        high: its last point (the paper's beta).
        stride: the first pass over the grid tries every stride-th point, the second all between
            the neighbours of the two best; 1 tries all.
        rows: rows of each product that candidates are compared on.
        memory_bytes: bound of what is kept of the float model between batches (besides, the
            activations of four images at a time); rows are fewer where it is tight.
        seed: of the choice of rows, sampled labels and noise.
        opt_m: search the region ratio of twin quantizers with their scale, uniform grids among
            the candidates (MPTQ-ViT, arXiv 2401.14895); False keeps the hand-set rule.
    """

    metric: Metric = Metric.FISHER
    loss: GradientLoss = GradientLoss.MARGIN
    rounds: int = 3
    candidates: int = 100
    low: float = 0.01
    high: float = 1.2
    stride: int = 8
    rows: int = 512
    memory_bytes: int = 1 << 30
    seed: int = 0
    opt_m: bool = False

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UnknownKeyError: metric or loss is unknown.
            PolicyError: a number is none, or out of its range.
        """
        parse_field(self, "metric", Metric)
        parse_field(self, "loss", GradientLoss)
        check_flag(self, "opt_m")
        check_whole(self, "candidates", 2)
        for name in ("rounds", "stride", "rows", "memory_bytes"):
            check_whole(self, name, 1)
        check_seed(self)
        check_number(self, "low")
        check_number(self, "high")
        if not LEAST_LOW <= self.low < 1 <= self.high <= 10:
            raise PolicyError(
                f"the grid needs {LEAST_LOW} <= low < 1 <= high <= 10, got {self.low} and "
                f"{self.high}: the min-max scale itself is a candidate"
            )
