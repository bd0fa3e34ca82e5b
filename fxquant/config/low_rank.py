"""Options of low-rank branches that correct the error of rounded weights. Frozen data."""

from __future__ import annotations

from dataclasses import dataclass

from fxquant.config.spec import MAX_KERNEL_BITS, MIN_BITS
from fxquant.config.validation import is_number, is_whole
from fxquant.errors import BitWidthError, PolicyError


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """A branch parallel to each linear: ``up(down(x))`` adds the weight's rounding error back.

    Set either ``rank`` or ``share``.

    Attributes:
        rank: rank of every branch: a whole number, at most the rank of the layer; or a number
            below one, a share of the smaller of the layer's input and output channels.
        share: bytes of all branches as a share of the bytes of the weights they correct; ranks go
            to the layers where each byte reduces the output error most.
        bits: width of the factors and of the activation between them, 2 to 8.
    """

    rank: int | float | None = None
    share: float | None = None
    bits: int = 8

    def __post_init__(self) -> None:
        """Checks types and ranges.

        Raises:
            BitWidthError: bits is not an integer in 2..8.
            PolicyError: rank or share is not a positive number, or not exactly one is set.
        """
        for name in ("rank", "share"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and value > 0):
                raise PolicyError(
                    f"{name} must be a positive number, got {value!r}",
                    got=value,
                    expected="a positive number",
                )
        if (self.rank is None) == (self.share is None):
            raise PolicyError(
                "low_rank takes either a rank for every layer or a share of the weights' bytes, "
                f"got rank={self.rank!r} and share={self.share!r}",
                got=(self.rank, self.share),
                expected="a rank or a share",
            )
        if isinstance(self.rank, float) and self.rank >= 1:
            raise PolicyError(
                f"rank must be a whole number, or a share below 1 of the channels, got {self.rank}",
                got=self.rank,
                expected="a whole number, or a share below 1",
            )
        if not is_whole(self.bits):
            raise BitWidthError(
                f"bits must be an integer, got {self.bits!r}", got=self.bits, expected=int
            )
        if not MIN_BITS <= self.bits <= MAX_KERNEL_BITS:
            raise BitWidthError(
                f"bits of a branch must be in {MIN_BITS}..{MAX_KERNEL_BITS}, got {self.bits}",
                got=self.bits,
                expected=f"{MIN_BITS}..{MAX_KERNEL_BITS}",
            )
