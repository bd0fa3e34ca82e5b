"""Options of mixed precision: candidate widths, budget, method. Frozen data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from fxquant.config.renamed import renamed
from fxquant.config.spec import MAX_KERNEL_BITS, MIN_BITS
from fxquant.config.validation import (
    check_number,
    check_seed,
    check_whole,
    is_number,
    is_whole,
    parse_field,
)
from fxquant.errors import BitWidthError, PolicyError


class Cost(StrEnum):
    """Costs of a model's bit-widths; :class:`Budget` defines how each is counted."""

    WEIGHT_BYTES = "weight_bytes"
    BITOPS = "bitops"
    MEAN_WEIGHT_BITS = "mean_weight_bits"
    MEAN_ACT_BITS = "mean_act_bits"
    MEAN_BITS = "mean_bits"


class Method(StrEnum):
    """Method of choosing widths.

    ``exact`` finds the widths of least predicted loss (an integer program). ``greedy`` lowers the
    width whose rise of the loss per cost saved is least, until the budget holds; it can measure its
    best candidates again with all other groups at their current widths.
    """

    EXACT = "exact"
    GREEDY = "greedy"


class Sensitivity(StrEnum):
    """Source of the rise of the loss by one group at one width.

    ``measured`` runs the network with only that group quantized. ``estimated`` weights the output
    error of the products that read the group by squared gradients, without running the network, in
    units of the loss whose gradient the policy's search uses.
    """

    MEASURED = "measured"
    ESTIMATED = "estimated"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Upper bounds of costs; every bound that is not None must hold.

    Every quantized operand of a product counts, pinned operands at their fixed width. Float edges,
    biases, scales and the operations between products (norms, additions) do not count. A value
    that several edges read through one quantizer counts once.

    Attributes:
        weight_bytes: bytes of all weights: sum of values times bits, divided by 8.
        bitops: bit operations for one image: sum over products with two quantized operands of
            multiplications times bits of the left times bits of the right operand.
        mean_weight_bits: mean width of the weights, over all values.
        mean_act_bits: mean width of the activations, over the values of one image.
        mean_bits: mean width over the values of all weights and of the activations of one image.
    """

    weight_bytes: float | None = None
    bitops: float | None = None
    mean_weight_bits: float | None = None
    mean_act_bits: float | None = None
    mean_bits: float | None = None

    def __post_init__(self) -> None:
        """Checks the bounds.

        Raises:
            PolicyError: all bounds are None, or a bound is not a positive number.
        """
        for cost in Cost:
            value = getattr(self, cost)
            if value is not None and not (is_number(value) and 0 < value < math.inf):
                raise PolicyError(
                    f"{cost} must be a positive number or null, got {value!r}",
                    got=value,
                    expected="a positive number or null",
                )
        if not self.limits:
            raise PolicyError(
                f"the budget is empty: give at least one of {', '.join(Cost)}", expected=tuple(Cost)
            )

    @property
    def limits(self) -> dict[Cost, float]:
        """The bounds that are not None."""
        return {cost: value for cost in Cost if (value := getattr(self, cost)) is not None}


@renamed({"work": "max_macs"})
@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Choice of a width for every quantized operand of a product whose rule is not pinned.

    Attributes:
        budget: upper bounds of the widths' costs.
        widths: candidate widths, each in 2..8.
        method: method of choosing among them.
        sensitivity: source of the losses that the choice is based on.
        images: number of calibration images that losses are measured on, drawn by ``seed``; None
            uses as many as ``max_macs`` allows, at least four.
        max_macs: multiplications that measuring each operand at each width may take where
            ``images`` is None; losses that greedy measures again are not counted. The default
            takes about four minutes on two cores of an AVX2 server.
        recheck: number of best candidates that greedy measures again at each step, with all
            other groups at their current widths; 0 for none. Used only by greedy with measured
            sensitivities.
        seed: seed of the choice of images.
    """

    budget: Budget
    widths: tuple[int, ...] = (3, 4, 5, 6, 8)
    method: Method = Method.EXACT
    sensitivity: Sensitivity = Sensitivity.MEASURED
    images: int | None = None
    max_macs: float = 1.4e13
    recheck: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks types and ranges.

        Raises:
            BitWidthError: a width is not a whole number in 2..8.
            UnknownKeyError: method or sensitivity is unknown.
            PolicyError: the budget is not a Budget, or an option has the wrong type or is out of
                its range.
        """
        parse_field(self, "method", Method)
        parse_field(self, "sensitivity", Sensitivity)
        if not isinstance(self.budget, Budget):
            raise PolicyError(
                f"budget must be a Budget, got {self.budget!r:.80}",
                got=self.budget,
                expected=Budget,
            )
        if not isinstance(self.widths, tuple | list) or not self.widths:
            raise PolicyError(
                "widths must be a tuple of widths, such as (4, 8), or a list in a policy file, "
                f"such as `widths: [4, 8]`, got {self.widths!r:.80}",
                got=self.widths,
                expected="a tuple or list of widths",
            )
        for bits in self.widths:
            if not is_whole(bits) or not MIN_BITS <= bits <= MAX_KERNEL_BITS:
                raise BitWidthError(
                    f"widths must be whole numbers in {MIN_BITS}..{MAX_KERNEL_BITS}, got "
                    f"{bits!r}; for a wider edge give its rule `pinned: true`",
                    got=bits,
                    expected=f"{MIN_BITS}..{MAX_KERNEL_BITS}",
                )
        object.__setattr__(self, "widths", tuple(sorted(set(self.widths))))
        check_whole(self, "recheck", 0)
        check_seed(self)
        if self.images is not None:
            check_whole(self, "images", 1)
        check_number(self, "max_macs")
        if not 0 < self.max_macs < math.inf:
            raise PolicyError(
                f"max_macs must be a positive number, got {self.max_macs}",
                got=self.max_macs,
                expected="a positive number",
            )
