"""Presets that train the quantized network."""

from __future__ import annotations

from dataclasses import replace

from fxquant.config.recovery import BlockLoss, Reconstruction, WeightTraining
from fxquant.config.scale_search import ScaleSearch
from fxquant.config.spec import ObserverKind, Scheme, TensorSpec
from fxquant.config.validation import check_flags
from fxquant.errors import PolicyError
from fxquant.policies.policy import Policy, Rule
from fxquant.policies.presets.shared_rules import check_act_bits, searched_rules

# As in the paper: squared error of the block's output, no drops.
_PAPER = Reconstruction(block_loss=BlockLoss.MSE, drop=0.0)


def aiqvit(
    weight_bits: int = 8,
    act_bits: int = 8,
    *,
    image_bits: int = 8,
    low_rank: bool = True,
    focusing: bool = True,
    curriculum: bool = True,
    reconstruction: Reconstruction = _PAPER,
) -> Policy:
    """AIQViT: low-rank changes of weights, trained block by block (arXiv 2502.04628).

    Weights are changed by low-rank factors whose rank is searched, and then rounded; attention is
    quantized by a dynamic focusing quantizer whose interval is trained; training begins with the
    easy images. Differences from the paper: weights are symmetric, as integer kernels need; the
    channels behind LayerNorms are moved onto one range before training, not after; scales start
    from the gradient-weighted search of :func:`ptq4vit`; biases are trained too, and the patch
    embedding and head as well as the blocks; of eight states during training the state of least
    loss on held-out images is kept; and there are far fewer steps.

    Args:
        weight_bits: width of all weights, symmetric per output channel.
        act_bits: width of activations, 2 to 8; queries, keys and values symmetric per head, all
            others per tensor.
        image_bits: width of the images that the first layer reads.
        low_rank: train low-rank factors of weights; False trains only scales and biases.
        focusing: use the dynamic focusing quantizer behind softmax; False uses a uniform one.
        curriculum: begin the training with easy images.
        reconstruction: steps, learning rates and loss; its weights, ranks and curriculum are
            replaced. The paper uses 2,000 ``rank_iterations`` and 6,000 ``iterations`` of 24 images
            out of 1,024.

    Raises:
        BitWidthError: a width is outside 2..16, or act_bits above 8 with the focusing quantizer.
        PolicyError: an option has the wrong type.
    """
    check_flags(low_rank=low_rank, focusing=focusing, curriculum=curriculum)
    if not isinstance(reconstruction, Reconstruction):
        raise PolicyError(
            f"reconstruction must be a Reconstruction, got {reconstruction!r:.80}",
            got=reconstruction,
            expected=Reconstruction,
        )
    weights = WeightTraining.LOW_RANK if low_rank else WeightTraining.NONE
    rules: tuple[Rule, ...] = ()
    if focusing:
        check_act_bits(act_bits, Scheme.DYNAMIC_FOCUSING, "aiqvit(focusing=False)")
        focus = TensorSpec(
            bits=act_bits,
            scheme=Scheme.DYNAMIC_FOCUSING,
            observer=ObserverKind.PERCENTILE,
            percentile=99.8,
        )
        rules = (Rule(fed_by="softmax", spec=focus, optional=True),)
    options = {"_no_low_rank": low_rank, "_no_focusing": focusing, "_no_curriculum": curriculum}
    suffixes = "".join(suffix for suffix, on in options.items() if not on)
    return Policy(
        name=f"aiqvit_w{weight_bits}a{act_bits}{suffixes}",
        description="AIQViT: low-rank changes of weights and focused attention, trained by blocks",
        search=ScaleSearch(),
        reparameterize=True,
        reconstruction=replace(
            reconstruction,
            weights=weights,
            ranks=(10, 20, 50, 100, 150),
            curriculum=0.5 if curriculum else 1.0,
        ),
        rules=(*rules, *searched_rules(weight_bits, act_bits, image_bits)),
    )
