"""Options of compensation and reconstruction, which recover accuracy once scales are fixed."""

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
    """Trained form of a weight.

    ``straight_through``: every value, the gradient passing the rounding; ``adaround``: whether a
    value is rounded up or down (arXiv 2004.10568); ``low_rank``: two low-rank factors added to the
    weight before it is rounded (AIQViT, arXiv 2502.04628, eq. 9); ``scales``: only the scale of
    each output channel, with codes unchanged; ``none``: the weight is not trained.
    """

    STRAIGHT_THROUGH = "straight_through"
    ADAROUND = "adaround"
    LOW_RANK = "low_rank"
    SCALES = "scales"
    NONE = "none"


class Scope(StrEnum):
    """Part of the network that is trained at once.

    ``block``: one transformer block after another, each towards the float block's output;
    ``network``: all blocks together, towards the float network's outputs.
    """

    BLOCK = "block"
    NETWORK = "network"


class BlockLoss(StrEnum):
    """Distance of a quantized block's output from the float block's output.

    ``mse``: squared error; ``fisher``: squared error weighted by the squared gradient of a loss of
    the network's outputs (BRECQ, arXiv 2102.05426, eq. 10), whose means over the images and along
    each axis are multiplied to the weight of a value; ``feature``: twice the squared error of the
    block plus the squared error of the last product's input, which the float rest of the network
    computes from the block's output, each divided by its first value.
    """

    MSE = "mse"
    FISHER = "fisher"
    FEATURE = "feature"


@renamed({"by_columns": "gptq"})
@dataclass(frozen=True, kw_only=True)
class Compensation:
    """Closed-form correction of weights, layer by layer, without training.

    Attributes:
        gptq: round weights column by column, later columns correcting the errors of earlier ones
            (GPTQ, arXiv 2210.17323); otherwise round to nearest.
        ridge: first move the weights by ridge regression, so that the outputs from quantized inputs
            come nearest to the float outputs (ERQ, arXiv 2407.06794, eq. 10), as far as held-out
            images and the images augmented from them confirm it. The ridge lowers the error of
            each layer, not always the network's loss.
        damping: share of the mean variance of the inputs that is added to each variance.
        images: least number of images to fit to. Where the loader has fewer, more are augmented
            from them as in :class:`Reconstruction`, as many as 0.2 TMAC run through the network;
            0 augments none.
        memory_bytes: budget for the values held between blocks; values beyond it go to files.
    """

    gptq: bool = True
    ridge: bool = False
    damping: float = 0.01
    images: int = 0
    memory_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        """Checks types and ranges.

        Raises:
            PolicyError: an option has the wrong type or is out of its range, or both ``gptq`` and
                ``ridge`` are off.
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
    """Training of each block towards the float block, on inputs from the quantized blocks before.

    Attributes:
        scope: block by block, or the whole network at once.
        weights: trained form of the weights.
        scales: train the scales and zero points of activations, except those of logarithmic
            quantizers, and the scales of the weights that are trained.
        biases: train the biases of products.
        block_loss: the loss of a block. The last block and a whole network are compared by their
            outputs: logits by their divergence, other outputs, and all with ``mse``, by squared
            error.
        gradient: the loss of the outputs whose gradient weights errors, for ``fisher``.
        iterations: number of steps for each block.
        batch: number of images in a step.
        weight_rate: first learning rate of weights, in steps of their quantizer.
        scale_rate: first learning rate of logarithms of scales, and of zero points as shares of
            the code range. Both rates fall to zero along a cosine.
        drop: share of the activations left unquantized in a step (QDrop, arXiv 2203.05740).
        held_out: share of the images that validate the training, at least one image. Their loss is
            measured eight times; the state of least loss is kept, and where the loss never falls
            nothing is changed. The reported loss is therefore the least of eight. 0 trains and
            validates on all images; with ``augment`` it validates on images augmented from them.
        curriculum: share of the images, those of smallest loss, that the first step draws from;
            the share grows to 1 (AIQViT, section 3.3). 1 draws from all images.
        augment: rotate, shift, recolour and mix the images of each step; targets are the float
            network's outputs for these. Inputs that are not images ``(B, C, H, W)`` are only
            mixed. Needs the scope ``network``. A curriculum sorts the original images.
        images: least number of images for the scope ``block``. Where there are fewer, more are
            augmented once from those that are trained on; 0 augments none.
        max_macs: multiplications that all steps of all blocks may take, validation, rank search and
            loss ``feature`` not counted. Where ``iterations`` would take more, fewer steps are
            done; where fewer than 20 fit, nothing is trained. None sets no bound.
        ranks: ranks of low-rank factors, each at most half of the weight's full rank; from several
            ranks a search chooses one for each weight (AIQViT, section 3.2).
        rank_iterations: number of steps of that search for each block.
        memory_bytes: budget for the values held between blocks, beyond which they go to files; and
            for the values of a step, beyond which its images are split into parts.
        bf16: compute products of blocks in bfloat16.
        seed: seed of the choice of images, of drops and of the first factors.
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
    images: int = 0
    max_macs: float | None = None
    ranks: tuple[int, ...] = (16,)
    rank_iterations: int = 200
    memory_bytes: int = 2 << 30
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks types and ranges.

        Raises:
            UnknownKeyError: scope, weights, block_loss or gradient is unknown.
            PolicyError: an option has the wrong type or is out of its range; ``augment`` is set
                with another scope than ``network``, or ``images`` with that scope; ``weights`` is
                ``scales`` with ``scales`` off; or nothing is trained.
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
        check_whole(self, "images", 0)
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
            raise PolicyError(
                "ranks must be a tuple of whole numbers >= 1, such as (16,), or a list in a policy "
                f"file, such as `ranks: [16]`, got {self.ranks!r:.80}",
                got=self.ranks,
                expected="a tuple or list of whole numbers >= 1",
            )
        object.__setattr__(self, "ranks", tuple(self.ranks))
        if self.images and self.scope is Scope.NETWORK:
            raise PolicyError(
                "images counts those that blocks are trained on: for a whole network set augment "
                "to True, which makes new images in each step, and images to 0",
                got=self.images,
                expected=0,
            )
        if self.augment and self.scope is not Scope.NETWORK:
            raise PolicyError(
                "augment makes new images in each step, but a block reads the outputs of earlier "
                "blocks: set scope to 'network', or augment to False and images to a number",
                got=self.scope,
                expected=Scope.NETWORK,
            )
        if self.weights is WeightTraining.SCALES and not self.scales:
            raise PolicyError(
                "weights 'scales' trains scales: set scales to True, or weights to 'none'",
                got=self.scales,
                expected=True,
            )
        if self.weights is WeightTraining.NONE and not (self.scales or self.biases):
            raise PolicyError("reconstruction trains nothing: turn on weights, scales or biases")
