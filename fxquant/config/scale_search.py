"""Options of the search of scales by the output error of products. Frozen data."""

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

# At this share of the min-max scale a quantizer of 2 to 16 bits clips nearly all values.
LEAST_LOW = 1e-6


class Metric(StrEnum):
    """Error of a product's output by which a search compares candidates.

    The formulas are in ``fxquant.search.metrics.losses``. Products of two activations use
    ``hessian`` where ``fisher`` is set: a column of q kᵀ is a different key in every image.
    """

    HESSIAN = "hessian"
    FISHER = "fisher"
    MSE = "mse"
    COSINE = "cosine"
    L1 = "l1"


# The metrics that need the gradient of a loss.
GRADIENT_METRICS = (Metric.HESSIAN, Metric.FISHER)


class GradientLoss(StrEnum):
    """The loss whose gradient weights errors of logits.

    Outputs that are not logits have the loss ``gaussian``, whichever loss is chosen: these are
    outputs of another shape than ``(B, C)``, and embeddings, which differ from logits in the
    operations that compute them (:mod:`fxquant.graph.embeddings`).

    ``argmax``: cross-entropy of the logits against the float model's arg-max, as in PTQ4ViT;
    ``sampled``: against a label drawn from the model's softmax, whose squared gradient is the
    Fisher information in expectation. Both gradients nearly vanish where the model is confident.
    ``margin``, the log-odds of the arg-max, has a gradient of the same order for every image.
    ``gaussian``, for all outputs, logits too: the squared distance to outputs moved by unit
    Gaussian noise, in expectation the Fisher information of a Gaussian (Gauss-Newton).
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
        metric: error of a quantized product.
        loss: the loss whose gradient the Hessian and Fisher metrics use.
        rounds: number of alternations between the operands of a product.
        candidates: number of points of the linear grid (n in the paper).
        low: first point of the grid, as a share of the min-max scale (alpha in the paper).
        high: last point of the grid (beta in the paper).
        stride: the first pass over the grid tries every stride-th point, the second pass all points
            between the neighbours of the two best; 1 tries all points at once.
        rows: number of rows of each product that candidates are compared on.
        memory_bytes: bound of the float values kept between batches, in addition to the
            activations of four images at a time; fewer rows are sampled where it is too small.
        seed: seed of the choice of rows, of sampled labels and of noise.
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
        """Checks types and ranges.

        Raises:
            UnknownKeyError: metric or loss is unknown.
            PolicyError: an option has the wrong type or is out of its range.
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
                f"{self.high}: the min-max scale itself is a candidate",
                got=(self.low, self.high),
                expected=f"{LEAST_LOW} <= low < 1 <= high <= 10",
            )
