"""The presets. Each is a function that returns a Policy."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

from fxquant.budget import Allocation, Budget, Method
from fxquant.errors import PolicyError, UnknownPresetError
from fxquant.policy import Policy, Rule
from fxquant.spec import (
    Arg,
    Granularity,
    Metric,
    ObserverKind,
    OpKind,
    ScaleSearch,
    Scheme,
    TensorSpec,
    check_flags,
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
        rules=_searched_rules(weight_bits, act_bits, image_bits),
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
        rules=(*twins, *_searched_rules(weight_bits, act_bits, image_bits)),
    )


def _searched_rules(weight_bits: int, act_bits: int, image_bits: int) -> tuple[Rule, ...]:
    channel, head = Granularity.CHANNEL, Granularity.HEAD
    return (
        Rule(
            arg=Arg.WEIGHT,
            spec=TensorSpec(bits=weight_bits, symmetric=True, granularity=channel),
            optional=True,
        ),
        Rule(fed_by="image", spec=TensorSpec(bits=image_bits), optional=True, pinned=True),
        Rule(fed_by="softmax", spec=TensorSpec(bits=act_bits), optional=True),
        Rule(
            op=OpKind.MATMUL,
            spec=TensorSpec(bits=act_bits, symmetric=True, granularity=head),
            optional=True,
        ),
        Rule(spec=TensorSpec(bits=act_bits)),
    )


def elementwise_rules(act_bits: int = 8, *, constant_bits: int = 16) -> tuple[Rule, ...]:
    """Rules for what stands between products: additions, norms, softmax, activation functions.

    Args:
        act_bits: width of activations, asymmetric per tensor.
        constant_bits: width of constants that are added: position embeddings, relative position
            biases, attention masks. A constant costs no time to quantize, and a mask of 0 and -100
            beside scores of a few units needs a wide grid.

    Raises:
        BitWidthError: a width is outside 2..16.
    """
    constants = TensorSpec(bits=constant_bits)
    scores = TensorSpec(bits=act_bits, observer=ObserverKind.SOFTMAX)
    # One spec for additions and norms: the residual stream, which both read, is quantized once.
    rest = TensorSpec(bits=act_bits, observer=ObserverKind.MSE)
    kinds = (OpKind.ADD, OpKind.LAYER_NORM, OpKind.RMS_NORM, OpKind.ACTIVATION)
    return (
        Rule(op=OpKind.ADD, fed_by="parameter", spec=constants, optional=True),
        Rule(op=OpKind.SOFTMAX, spec=scores, optional=True),
        *(Rule(op=kind, spec=rest, optional=True) for kind in kinds),
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


PRESETS: dict[str, Callable[..., Policy]] = {
    "w8a8": w8a8,
    "w8a8_full": w8a8_full,
    "minmax": minmax,
    "base_ptq": base_ptq,
    "ptq4vit": ptq4vit,
    "mptq_vit": mptq_vit,
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
