"""How accuracy is won back once scales are fixed. Frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from fxquant.config.renamed import renamed
from fxquant.config.scale_search import GradientLoss
from fxquant.config.validation import (
    check_flag,
    check_number,
    check_seed,
    check_whole,
    is_whole,
    parse_field,
)
from fxquant.errors import PolicyError


class WeightTraining(StrEnum):
    """What of a weight is trained.

    ``straight_through``: every value, the gradient passing the rounding; ``adaround``: whether a
    value is rounded up or down (arXiv 2004.10568); ``low_rank``: two thin factors added to the
    weight before it is rounded (AIQViT, arXiv 2502.04628, eq. 9); ``scales``: the scale of each
    output channel alone, codes stay; ``none``: nothing.
    """

    STRAIGHT_THROUGH = "straight_through"
    ADAROUND = "adaround"
    LOW_RANK = "low_rank"
    SCALES = "scales"
    NONE = "none"


class Scope(StrEnum):
    """What is trained at once.

    ``block``: one transformer block after another, each to give what the float block gives;
    ``network``: all blocks together, to give the float network's outputs.
    """

    BLOCK = "block"
    NETWORK = "network"


class BlockLoss(StrEnum):
    """How far a quantized block's output is from the float one.

    ``mse``: squared error; ``fisher``: weighed by the squared gradient of a loss of the network's
    outputs (BRECQ, arXiv 2102.05426, eq. 10), of which the means over the images and along each
    axis are kept, and their product is the weight of a value; ``feature``: squared error
    of the block, doubled, and of the last product's input, which the float rest of the network
    computes from the block's output, each as a share of its first value (METHODS 4.1).
    """

    MSE = "mse"
    FISHER = "fisher"
    FEATURE = "feature"


@renamed({"by_columns": "gptq"})
@dataclass(frozen=True, kw_only=True)
class Compensation:
    """Weights that make up for quantization in closed form, layer after layer, no training.

    Attributes:
        gptq: round weights column by column, later columns correcting the errors of earlier ones
            (GPTQ, arXiv 2210.17323); otherwise round to nearest.
        ridge: first move weights to where the outputs of the quantized inputs come nearest to the
            float outputs (ERQ, arXiv 2407.06794, eq. 10), as far as that holds on images left out,
            with all that were made of them. It lowers the error of each layer, not always the
            network's loss.
        damping: share of the mean variance of the inputs that is added to each.
        images: least number to fit to. Where fewer are given, others are made of them as in
            :class:`Reconstruction`, as far as 0.2 TMAC run them through the network; 0 makes none.
        memory_bytes: budget for the values that are held between blocks; more go to files.
    """

    gptq: bool = True
    ridge: bool = False
    damping: float = 0.01
    images: int = 0
    memory_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            PolicyError: a flag is no boolean, or a number is none, or out of its range.
        """
        check_flag(self, "gptq")
        check_flag(self, "ridge")
        check_number(self, "damping", (1e-6, 1.0))
        check_whole(self, "images", 0)
        check_whole(self, "memory_bytes", 1)
        if not (self.gptq or self.ridge):
            raise PolicyError("compensation does nothing: turn on gptq, ridge or both")


@renamed({"work": "max_macs"})
@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Training of each block against the float one, inputs from the quantized blocks before it.

    Attributes:
        scope: block after block, or all together.
        weights: what of them is trained.
        scales: train the scales and zero points of activations, those of logarithmic quantizers
            excepted, and the scales of those weights that are trained.
        biases: train the biases of products.
        block_loss: what is minimised; the last block, and a network, are compared by their
            outputs: logits by their divergence, others, and all with ``mse``, by squared error.
        gradient: the loss of the outputs whose gradient weighs errors, for ``fisher``.
        iterations: steps for each block.
        batch: images of a step.
        weight_rate: first learning rate of weights, in steps of their quantizer.
        scale_rate: first learning rate of logarithms of scales, and of zero points as shares of
            the code range. Both rates fall to zero along a cosine.
        drop: share of the activations left unquantized in a step (QDrop, arXiv 2203.05740).
        held_out: share of the images that are not trained on, at least one. By their loss,
            looked at eight times on the way, the best state is kept, and where it never falls all
            stays as it was; so the reported loss is the least of eight. 0 trains on all images and
            judges by the same, or, with ``augment``, by others made of them.
        curriculum: share of the images, those of smallest loss, that the first step draws from;
            it grows to 1 (AIQViT, section 3.3). 1 draws from all.
        augment: take the images of each step turned, moved, recoloured and mixed, and as targets
            what the float network gives for those; what is no image ``(B, C, H, W)`` is mixed
            alone. Only with the scope ``network``. A curriculum sorts images as they were given.
        max_macs: multiplications that all steps of the training of a ``network`` may take,
            evaluations and rank search not counted; fewer steps are done where they would take
            more, and nothing is trained where fewer than 20 are left. None sets no bound.
        ranks: of low-rank factors, each cut at half of what the weight can have; where there are
            several, a search chooses one for each weight (AIQViT, section 3.2).
        rank_iterations: its steps, for each block.
        memory_bytes: budget for the values that are held between blocks, more go to files; and
            for those of a step, whose images are taken in parts where it is too small.
        bf16: compute products of blocks in bfloat16.
        seed: of images, drops and first factors.
    """

    scope: Scope = Scope.BLOCK
    weights: WeightTraining = WeightTraining.STRAIGHT_THROUGH
    scales: bool = True
    biases: bool = True
    block_loss: BlockLoss = BlockLoss.FISHER
    gradient: GradientLoss = GradientLoss.MARGIN
    iterations: int = 500
    batch: int = 32
    weight_rate: float = 2e-3
    scale_rate: float = 1e-3
    drop: float = 0.5
    held_out: float = 0.125
    curriculum: float = 1.0
    augment: bool = False
    max_macs: float | None = None
    ranks: tuple[int, ...] = (16,)
    rank_iterations: int = 200
    memory_bytes: int = 2 << 30
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UnknownKeyError: scope, rounding, loss or gradient is unknown.
            PolicyError: a number is none, or out of its range; ``augment`` or ``max_macs`` is given
            with another scope than ``network``; weights' scales, or nothing at all, is trained.
        """
        parse_field(self, "scope", Scope)
        parse_field(self, "weights", WeightTraining)
        parse_field(self, "block_loss", BlockLoss)
        parse_field(self, "gradient", GradientLoss)
        check_flag(self, "scales")
        check_flag(self, "biases")
        check_flag(self, "bf16")
        check_flag(self, "augment")
        for name in ("iterations", "batch", "rank_iterations", "memory_bytes"):
            check_whole(self, name, 1)
        check_seed(self)
        check_number(self, "weight_rate", (1e-7, 1.0))
        check_number(self, "scale_rate", (1e-7, 1.0))
        check_number(self, "drop", (0.0, 0.95))
        check_number(self, "held_out", (0.0, 0.5))
        check_number(self, "curriculum", (0.01, 1.0))
        if self.max_macs is not None:
            check_number(self, "max_macs", (1.0, 1e30))
        whole = isinstance(self.ranks, tuple | list) and all(map(is_whole, self.ranks))
        if not whole or not self.ranks or min(self.ranks) < 1:
            raise PolicyError(f"ranks must be whole numbers >= 1, got {self.ranks!r:.80}")
        object.__setattr__(self, "ranks", tuple(self.ranks))
        if self.max_macs is not None and self.scope is not Scope.NETWORK:
            raise PolicyError(
                "max_macs bounds the training of a whole network: set scope to 'network', or "
                "max_macs to None and iterations to fewer steps for each block"
            )
        if self.augment and self.scope is not Scope.NETWORK:
            raise PolicyError(
                "augment makes new images, and a block reads what earlier blocks make of them: "
                "set scope to 'network', or augment to False"
            )
        if self.weights is WeightTraining.SCALES and not self.scales:
            raise PolicyError(
                "weights 'scales' trains scales: set scales to True, or weights to 'none'"
            )
        if self.weights is WeightTraining.NONE and not (self.scales or self.biases):
            raise PolicyError("reconstruction trains nothing: turn on weights, scales or biases")
