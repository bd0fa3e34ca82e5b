"""Presets that search scales by the output error of products."""

from __future__ import annotations

from dataclasses import replace

from fxquant.config.allocation import Allocation, Budget, Method
from fxquant.config.scale_search import Metric, ScaleSearch
from fxquant.config.spec import Scheme, TensorSpec
from fxquant.config.validation import check_flags
from fxquant.errors import PolicyError
from fxquant.policies.policy import Policy, Rule
from fxquant.policies.presets.shared_rules import check_act_bits, elementwise_rules, searched_rules


def base_ptq(weight_bits: int = 8, act_bits: int = 8, *, image_bits: int = 8) -> Policy:
    """The baseline of PTQ4ViT: uniform everywhere, one round, cosine (arXiv 2111.12293, table 1).

    Activations are asymmetric and weights have a scale for each output channel, as in all presets
    here; in the paper they are symmetric and per tensor. The baseline here is therefore stronger.

    Args:
        weight_bits: width of all weights, symmetric per output channel.
        act_bits: width of activations; queries, keys and values symmetric per head, all others
            asymmetric per tensor.
        image_bits: width of the images that the first layer reads.

    Raises:
        BitWidthError: a width is outside 2..16.
    """
    return Policy(
        name=f"base_ptq_w{weight_bits}a{act_bits}",
        description="PTQ4ViT's baseline: uniform quantizers, scales searched by cosine distance",
        search=ScaleSearch(metric=Metric.COSINE, rounds=1, low=0.5),
        rules=searched_rules(weight_bits, act_bits, image_bits),
    )


def ptq4vit(
    weight_bits: int = 8,
    act_bits: int = 8,
    *,
    image_bits: int = 8,
    twin: bool = True,
    search: ScaleSearch = ScaleSearch(),  # noqa: B008  frozen
    rotate: bool = False,
    reparameterize: bool = False,
    bias_correction: bool = False,
) -> Policy:
    """PTQ4ViT: twin uniform quantizers and a gradient-guided search (arXiv 2111.12293).

    Differences from the paper: activations are asymmetric and weights have a scale for each output
    channel (in the paper symmetric and per tensor); the image has 8 bits; and the default search is
    ours (see :class:`ScaleSearch`).

    Args:
        weight_bits: width of all weights, symmetric per output channel.
        act_bits: width of activations; queries, keys and values symmetric per head, all others
            per tensor.
        image_bits: width of the images that the first layer reads.
        twin: use twin uniform quantizers behind softmax, GELU, SiLU and hard-swish.
        search: metric, grid and rounds of the search of scales.
        rotate: turn residual streams and heads first; see :class:`Policy`.
        reparameterize: move channels behind LayerNorms onto one range; see :class:`Policy`.
        bias_correction: correct biases for the rounding of weights; see :class:`Policy`.

    Raises:
        BitWidthError: a width is outside 2..16; or act_bits is above 8, which twin quantizers do
            not support: turn them off with ``twin=False``.
        PolicyError: ``search`` is not a ScaleSearch, or a flag not a boolean.
    """
    check_flags(
        twin=twin, rotate=rotate, reparameterize=reparameterize, bias_correction=bias_correction
    )
    if not isinstance(search, ScaleSearch):
        raise PolicyError(
            f"search must be a ScaleSearch, such as ScaleSearch(rounds=1), got {search!r:.80}",
            got=search,
            expected=ScaleSearch,
        )
    twins: tuple[Rule, ...] = ()
    if twin:
        check_act_bits(act_bits, Scheme.TWIN_UNIFORM, "ptq4vit(twin=False)")
        spec = TensorSpec(bits=act_bits, scheme=Scheme.TWIN_UNIFORM)
        twins = tuple(
            Rule(fed_by=name, spec=spec, optional=True)
            for name in ("softmax", "gelu", "silu", "hardswish")
        )
    options = {
        "_uniform": not twin,
        "_rotated": rotate,
        "_repq": reparameterize,
        "_bias": bias_correction,
    }
    suffixes = "".join(suffix for suffix, on in options.items() if on)
    if search != ScaleSearch():
        suffixes += f"_{search.metric}"
    kind = "twin uniform" if twin else "uniform"
    return Policy(
        name=f"ptq4vit_w{weight_bits}a{act_bits}{suffixes}",
        description=f"PTQ4ViT: {kind} quantizers; scales by output error ({search.metric})",
        search=search,
        rotate=rotate,
        reparameterize=reparameterize,
        bias_correction=bias_correction,
        rules=(*twins, *searched_rules(weight_bits, act_bits, image_bits)),
    )


def mptq_vit(
    weight_bits: int = 8,
    act_bits: int = 8,
    *,
    image_bits: int = 8,
    budget: Budget | None = None,
    full: bool = False,
) -> Policy:
    """MPTQ-ViT: SQ-b, OPT-m and mixed precision (arXiv 2401.14895).

    Extends :func:`ptq4vit`: channels are smoothed first where that halves the loss, and the region
    ratio of twin quantizers is searched with their scale, uniform quantizers among the candidates.

    Args:
        weight_bits: width of all weights, symmetric per output channel.
        act_bits: width of activations; queries, keys and values symmetric per head, all others
            per tensor.
        image_bits: width of the images that the first layer reads.
        budget: budget of greedy mixed precision (:class:`fxquant.Allocation`): each operand of a
            product except the image gets its own width of 3 to 8 bits; smoothing is then decided
            at ``weight_bits`` and ``act_bits``.
        full: also quantize the inputs of norms, softmax, GELU and additions to 8 bits
            (:func:`elementwise_rules`).

    Raises:
        BitWidthError: a width is outside 2..16; or act_bits is above 8, which twin quantizers do
            not support.
        PolicyError: ``budget`` is not a Budget, or ``full`` not a boolean.
    """
    check_flags(full=full)
    search = ScaleSearch(search_region_ratio=True)
    base = ptq4vit(weight_bits, act_bits, image_bits=image_bits, search=search)
    widths = f"w{weight_bits}a{act_bits}" if budget is None else "mixed"
    return replace(
        base,
        name=f"mptq_vit_{widths}{'_full' if full else ''}",
        description="MPTQ-ViT: smoothed channels (SQ-b), searched region ratios (OPT-m)"
        + ("" if budget is None else ", greedy mixed precision"),
        rules=(*(elementwise_rules() if full else ()), *base.rules),
        smooth=True,
        allocation=None if budget is None else Allocation(budget=budget, method=Method.GREEDY),
    )
