"""Presets whose scales are fitted to observed ranges."""

from __future__ import annotations

from fxquant.config.spec import Granularity, ObserverKind, TensorSpec
from fxquant.config.validation import check_flags
from fxquant.config.vocabulary import Arg
from fxquant.policies.policy import Policy, Rule
from fxquant.policies.presets.shared_rules import elementwise_rules


def w8a8(*, full: bool = False) -> Policy:
    """Eight bits everywhere, in the layout of integer CPU kernels.

    Weights are symmetric per output channel; activations asymmetric per tensor, their range that of
    all observed values, since outlying channels of pretrained transformers must not be clipped; the
    right operands of attention products are symmetric, since integer kernels treat them as weights.
    Softmax is divided behind its product (:class:`fxquant.passes.DeferSoftmax`). With ``full``,
    softmax is one operation, and ranges are chosen by least squared error, as those of the residual
    stream.

    Args:
        full: also quantize what norms, softmax, activation functions and additions read, so that
            ``lower("integer")`` needs no float arithmetic between products
            (:func:`elementwise_rules`).

    Raises:
        PolicyError: ``full`` is not a boolean.
    """
    check_flags(full=full)
    between = ", norms, softmax, GELU and sums" if full else ""
    observer = ObserverKind.MSE if full else ObserverKind.MINMAX
    return Policy(
        name="w8a8_full" if full else "w8a8",
        description=f"8-bit weights and activations{between} for integer CPU kernels",
        defer_softmax=not full,
        rules=(
            *(elementwise_rules() if full else ()),
            Rule(
                arg=Arg.WEIGHT,
                spec=TensorSpec(bits=8, symmetric=True, granularity=Granularity.CHANNEL),
                optional=True,  # a model may have products of activations only
            ),
            Rule(
                arg=Arg.RHS,
                spec=TensorSpec(bits=8, symmetric=True, observer=observer),
                optional=True,
            ),
            Rule(fed_by="softmax", spec=TensorSpec(bits=8), optional=True),
            Rule(spec=TensorSpec(bits=8, observer=observer)),
        ),
    )


def w8a8_full() -> Policy:
    """Preset :func:`w8a8` with ``full=True``: eight bits between products too."""
    return w8a8(full=True)


def minmax(weight_bits: int = 8, act_bits: int = 8, *, rotate: bool = False) -> Policy:
    """Min-max baseline: ranges are the smallest and largest values observed.

    Args:
        weight_bits: width of all weights, symmetric per output channel.
        act_bits: width of all activations, asymmetric per tensor.
        rotate: turn residual streams and heads first; see :class:`Policy`.

    Raises:
        BitWidthError: a width is outside 2..16.
        PolicyError: ``rotate`` is not a boolean.
    """
    check_flags(rotate=rotate)
    return Policy(
        name=f"minmax_w{weight_bits}a{act_bits}{'_rotated' if rotate else ''}",
        description="plain min-max ranges at any width: the baseline to compare with",
        rotate=rotate,
        rules=(
            Rule(
                arg=Arg.WEIGHT,
                spec=TensorSpec(bits=weight_bits, symmetric=True, granularity=Granularity.CHANNEL),
                optional=True,
            ),
            Rule(spec=TensorSpec(bits=act_bits)),
        ),
    )
