"""The presets. Each is a function that returns a Policy."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

from fxquant.budget import Allocation, Budget, Method
from fxquant.checks import check_flags
from fxquant.errors import PolicyError, UnknownPresetError
from fxquant.policy import Policy, Rule
from fxquant.preset_rules import elementwise_rules, searched_rules
from fxquant.recovery import Reconstruction, WeightTraining
from fxquant.spec import (
    Arg,
    Granularity,
    Metric,
    ObserverKind,
    ScaleSearch,
    Scheme,
    TensorSpec,
)
from fxquant.suggest import did_you_mean


def w8a8(*, full: bool = False) -> Policy:
    """Eight bits everywhere, laid out as integer CPU kernels want it.

    Weights symmetric per output channel; activations asymmetric per tensor, their range chosen by
    least squared error; the right operands of attention products symmetric, since they take the
    place of weights in the kernel; attention probabilities on the full range [0, max].

    Args:
        full: also quantize what norms, softmax, activation functions and additions read, so that
            ``lower("integer")`` needs no float arithmetic between products
            (:func:`elementwise_rules`).

    Raises:
        PolicyError: ``full`` is no boolean.
    """
    check_flags(full=full)
    besides = ", norms, softmax, GELU and sums" if full else ""
    return Policy(
        name="w8a8_full" if full else "w8a8",
        description=f"8-bit weights and activations{besides} for integer CPU kernels; least "
        "squared error",
        rules=(
            *(elementwise_rules() if full else ()),
            Rule(
                arg=Arg.WEIGHT,
                spec=TensorSpec(bits=8, symmetric=True, granularity=Granularity.CHANNEL),
                optional=True,  # a model of products of activations only
            ),
            Rule(
                arg=Arg.RHS,
                spec=TensorSpec(bits=8, symmetric=True, observer=ObserverKind.MSE),
                optional=True,
            ),
            Rule(fed_by="softmax", spec=TensorSpec(bits=8), optional=True),
            Rule(spec=TensorSpec(bits=8, observer=ObserverKind.MSE)),
        ),
    )


def w8a8_full() -> Policy:
    """:func:`w8a8` with ``full=True``: eight bits between products too."""
    return w8a8(full=True)


def minmax(weight_bits: int = 8, act_bits: int = 8) -> Policy:
    """The plain baseline: ranges are the smallest and largest value seen.

    Args:
        weight_bits: width of all weights, symmetric per output channel.
        act_bits: width of all activations, asymmetric per tensor.

    Raises:
        BitWidthError: a width is outside 2..16.
    """
    return Policy(
        name=f"minmax_w{weight_bits}a{act_bits}",
        description="plain min-max ranges at any width: the baseline to compare with",
        rules=(
            Rule(
                arg=Arg.WEIGHT,
                spec=TensorSpec(bits=weight_bits, symmetric=True, granularity=Granularity.CHANNEL),
                optional=True,
            ),
            Rule(spec=TensorSpec(bits=act_bits)),
        ),
    )


def base_ptq(weight_bits: int = 8, act_bits: int = 8, *, image_bits: int = 8) -> Policy:
    """The baseline of PTQ4ViT: uniform everywhere, one round, cosine (arXiv 2111.12293, table 1).

    Activations are asymmetric and weights have a scale for each output channel, as in all presets
    here, where the paper has them symmetric and per tensor; so it is a stronger baseline.

    Args:
        weight_bits: width of all weights, symmetric per output channel.
        act_bits: width of activations; queries, keys and values symmetric per head, all others
            asymmetric per tensor.
        image_bits: width of the images that the first layer takes.

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
    reparameterize: bool = False,
    bias_correction: bool = False,
) -> Policy:
    """PTQ4ViT: twin uniform quantizers and a gradient-guided search (arXiv 2111.12293).

    Where it differs from the paper: activations are asymmetric and weights have a scale for each
    output channel, which the paper has symmetric and per tensor; the image has 8 bits; and the
    default search is ours (see :class:`ScaleSearch`).

    Args:
        weight_bits: width of all weights, symmetric per output channel.
        act_bits: width of activations; queries, keys and values symmetric per head, all others
            per tensor.
        image_bits: width of the images that the first layer takes.
        twin: twin uniform quantizers behind softmax, GELU, SiLU and hard-swish.
        search: metric, grid and rounds.
        reparameterize: see :class:`Policy`.
        bias_correction: see :class:`Policy`.

    Raises:
        BitWidthError: a width is outside 2..16; or act_bits is above 8, which twin quantizers do
            not take: turn them off with ``twin=False``.
        PolicyError: ``search`` is no ScaleSearch, or a flag no boolean.
    """
    check_flags(twin=twin, reparameterize=reparameterize, bias_correction=bias_correction)
    if not isinstance(search, ScaleSearch):
        raise PolicyError(
            f"search must be a ScaleSearch, such as ScaleSearch(rounds=1), got {search!r:.80}"
        )
    twins: tuple[Rule, ...] = ()
    if twin:
        spec = TensorSpec(bits=act_bits, scheme=Scheme.TWIN_UNIFORM)
        twins = tuple(
            Rule(fed_by=name, spec=spec, optional=True)
            for name in ("softmax", "gelu", "silu", "hardswish")
        )
    options = {"_uniform": not twin, "_repq": reparameterize, "_bias": bias_correction}
    changed = "".join(suffix for suffix, on in options.items() if on)
    if search != ScaleSearch():
        changed += f"_{search.metric}"
    kind = "twin uniform" if twin else "uniform"
    return Policy(
        name=f"ptq4vit_w{weight_bits}a{act_bits}{changed}",
        description=f"PTQ4ViT: {kind} quantizers; scales by output error ({search.metric})",
        search=search,
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

    :func:`ptq4vit`, its channels smoothed first where the loss falls, the region ratio of twin
    quantizers searched with their scale, uniform ones among the candidates.

    Args:
        weight_bits: width of all weights, symmetric per output channel.
        act_bits: width of activations; queries, keys and values symmetric per head, all others
            per tensor.
        image_bits: width of the images that the first layer takes.
        budget: greedy mixed precision within it: each operand of a product but the image gets a
            width of 3 to 8 bits of its own (:class:`fxquant.Allocation`); at ``weight_bits`` and
            ``act_bits`` it is then decided what to smooth.
        full: also quantize what norms, softmax, GELU and additions read, to 8 bits
            (:func:`elementwise_rules`).

    Raises:
        BitWidthError: a width is outside 2..16; or act_bits is above 8, which twin quantizers do
            not take.
        PolicyError: ``budget`` is no Budget, or ``full`` no boolean.
    """
    check_flags(full=full)
    base = ptq4vit(weight_bits, act_bits, image_bits=image_bits, search=ScaleSearch(opt_m=True))
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


def aiqvit(
    weight_bits: int = 8,
    act_bits: int = 8,
    *,
    image_bits: int = 8,
    low_rank: bool = True,
    focusing: bool = True,
    curriculum: bool = True,
    reconstruction: Reconstruction = Reconstruction(),  # noqa: B008  frozen
) -> Policy:
    """AIQViT: low-rank changes of weights, trained block by block (arXiv 2502.04628).

    Weights move by factors whose rank a search chooses, and are rounded after that; attention is
    quantized by a dynamic focusing quantizer whose interval is trained; training begins with the
    images that are easy. Where it differs from the paper: weights are symmetric, which integer
    kernels want; the channels behind LayerNorms are moved onto one range before training, not
    after; scales start from the gradient-weighted search of :func:`ptq4vit`.

    Args:
        weight_bits: width of all weights, symmetric per output channel.
        act_bits: width of activations, 2 to 8; queries, keys and values symmetric per head, all
            others per tensor.
        image_bits: width of the images that the first layer takes.
        low_rank: train factors; without, weights stay and scales and biases alone are trained.
        focusing: the focusing quantizer; without, a uniform one.
        curriculum: easy images first.
        reconstruction: steps, rates, loss. The paper takes 2,000 ``rank_iterations`` and 6,000
            ``iterations`` of 24 images out of 1,024.

    Raises:
        BitWidthError: a width is outside 2..16, or act_bits above 8 with the focusing quantizer.
        PolicyError: an option has the wrong type.
    """
    check_flags(low_rank=low_rank, focusing=focusing, curriculum=curriculum)
    if not isinstance(reconstruction, Reconstruction):
        raise PolicyError(f"reconstruction must be a Reconstruction, got {reconstruction!r:.80}")
    weights = WeightTraining.LOW_RANK if low_rank else WeightTraining.NONE
    focus = TensorSpec(
        bits=act_bits,
        scheme=Scheme.DYNAMIC_FOCUSING,
        observer=ObserverKind.PERCENTILE,
        percentile=99.8,
    )
    rules = (Rule(fed_by="softmax", spec=focus, optional=True),) if focusing else ()
    parts = {"_no_low_rank": low_rank, "_no_focusing": focusing, "_no_curriculum": curriculum}
    changed = "".join(suffix for suffix, on in parts.items() if not on)
    return Policy(
        name=f"aiqvit_w{weight_bits}a{act_bits}{changed}",
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


PRESETS: dict[str, Callable[..., Policy]] = {
    "w8a8": w8a8,
    "w8a8_full": w8a8_full,
    "minmax": minmax,
    "base_ptq": base_ptq,
    "ptq4vit": ptq4vit,
    "mptq_vit": mptq_vit,
    "aiqvit": aiqvit,
}


def preset(name: str, *, weight_bits: int | None = None, act_bits: int | None = None) -> Policy:
    """The preset of that name, with its default options but for the widths given.

    Raises:
        UnknownPresetError: there is none; the message names the nearest.
        PolicyError: it has its own fixed widths.
    """
    if name not in PRESETS:
        raise UnknownPresetError(
            f"no preset {name!r}{did_you_mean(name, PRESETS)}; there are {', '.join(PRESETS)}. "
            "A policy file must exist and end in .yaml or .yml"
        )
    given = {"weight_bits": weight_bits, "act_bits": act_bits}
    widths = {key: bits for key, bits in given.items() if bits is not None}
    if widths and not set(widths) <= set(inspect.signature(PRESETS[name]).parameters):
        takers = [
            n for n, make in PRESETS.items() if "act_bits" in inspect.signature(make).parameters
        ]
        raise PolicyError(f"preset {name} has fixed widths; {', '.join(takers)} take any")
    return PRESETS[name](**widths)
