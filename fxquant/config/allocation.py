"""What a search of bit-widths may choose from, and what the result may cost. Frozen data."""

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
    """What the widths of a model cost; see :class:`Budget` for how each is counted."""

    WEIGHT_BYTES = "weight_bytes"
    BITOPS = "bitops"
    MEAN_WEIGHT_BITS = "mean_weight_bits"
    MEAN_ACT_BITS = "mean_act_bits"
    MEAN_BITS = "mean_bits"


class Method(StrEnum):
    """How widths are chosen.

    ``exact`` finds the widths of least predicted loss (an integer program); ``greedy`` lowers the
    group whose loss rises least for what it saves until the budget holds, and can measure its
    best candidates with all other groups as they are by then.
    """

    EXACT = "exact"
    GREEDY = "greedy"


class Sensitivity(StrEnum):
    """Where the rise of the loss by one group at one width is taken from.

    ``measured`` runs the network with that group quantized; ``estimated`` weighs the error of the
    products that read the group by squared gradients, without running it, in units of the loss
    whose gradient the policy's search takes.
    """

    MEASURED = "measured"
    ESTIMATED = "estimated"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Upper bounds; all that are given must hold.

    Every quantized operand of a product counts, pinned ones at their fixed width; edges left float
    do not, nor do biases, scales and what stands between products (norms, additions). A value that
    several edges read through one quantizer counts once.

    Attributes:
        weight_bytes: sum over weights of values times bits, over 8.
        bitops: for one image, sum over products with two quantized operands of multiplications
            times bits of the left times bits of the right operand.
        mean_weight_bits: bits of a weight, averaged over all values.
        mean_act_bits: bits of an activation, averaged over the values of one image.
        mean_bits: averaged over the values of all weights and of the activations of one image.
    """

    weight_bytes: float | None = None
    bitops: float | None = None
    mean_weight_bits: float | None = None
    mean_act_bits: float | None = None
    mean_bits: float | None = None

    def __post_init__(self) -> None:
        """Checks the bounds.

        Raises:
            PolicyError: none is given, or one is no positive number.
        """
        for cost in Cost:
            value = getattr(self, cost)
            if value is not None and not (is_number(value) and 0 < value < math.inf):
                raise PolicyError(f"{cost} must be a positive number or null, got {value!r}")
        if not self.limits:
            raise PolicyError(f"the budget is empty: give at least one of {', '.join(Cost)}")

    @property
    def limits(self) -> dict[Cost, float]:
        """The bounds that are given."""
        return {cost: value for cost in Cost if (value := getattr(self, cost)) is not None}


@renamed({"work": "max_macs"})
@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Choice of a width for every quantized operand of a product whose rule is not pinned.

    Attributes:
        budget: what the widths may cost.
        widths: candidates, each in 2..8.
        method: how they are chosen.
        sensitivity: what the choice goes by.
        images: calibration images that losses are measured on, drawn by ``seed``; None takes as
            many as ``max_macs`` allows, at least four.
        max_macs: multiplications that measuring each operand at each width may take where
            ``images`` is None; what greedy measures again is not counted. The default is some four
            minutes on two cores of an AVX2 server.
        recheck: number of best candidates that greedy measures again at each step, with all
            other groups at the widths they have by then; 0 for none. Read by greedy on measured
            sensitivities alone.
        seed: of the choice of images.
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
        """Checks the values.

        Raises:
            BitWidthError: a width is no whole number in 2..8.
            UnknownKeyError: method or sensitivity is unknown.
            PolicyError: the budget is no Budget, or a number is none, or out of its range.
        """
        parse_field(self, "method", Method)
        parse_field(self, "sensitivity", Sensitivity)
        if not isinstance(self.budget, Budget):
            raise PolicyError(f"budget must be a Budget, got {self.budget!r:.80}")
        if not isinstance(self.widths, tuple | list) or not self.widths:
            raise PolicyError(f"widths must be a tuple of widths, got {self.widths!r:.80}")
        for bits in self.widths:
            if not is_whole(bits) or not MIN_BITS <= bits <= MAX_KERNEL_BITS:
                raise BitWidthError(
                    f"widths must be whole numbers in {MIN_BITS}..{MAX_KERNEL_BITS}, got "
                    f"{bits!r}; for a wider edge give its rule `pinned: true`"
                )
        object.__setattr__(self, "widths", tuple(sorted(set(self.widths))))
        check_whole(self, "recheck", 0)
        check_seed(self)
        if self.images is not None:
            check_whole(self, "images", 1)
        check_number(self, "max_macs")
        if not 0 < self.max_macs < math.inf:
            raise PolicyError(f"max_macs must be a positive number, got {self.max_macs}")
