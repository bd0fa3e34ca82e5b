"""How scales are searched by the output error of products. Frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from fxquant.config.renamed import renamed
from fxquant.config.validation import (
    check_flag,
    check_number,
    check_seed,
    check_whole,
    parse_field,
)
from fxquant.errors import PolicyError

# A step this much finer than the min-max one, at 2 to 16 bits, clips all but next to nothing.
LEAST_LOW = 1e-6


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


@renamed({"opt_m": "search_region_ratio"})
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
        search_region_ratio: search the region ratio of twin quantizers with their scale, uniform
            grids among the candidates (OPT-m of MPTQ-ViT, arXiv 2401.14895); False keeps the
            hand-set rule.
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
    search_region_ratio: bool = False

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UnknownKeyError: metric or loss is unknown.
            PolicyError: a number is none, or out of its range.
        """
        parse_field(self, "metric", Metric)
        parse_field(self, "loss", GradientLoss)
        check_flag(self, "search_region_ratio")
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
