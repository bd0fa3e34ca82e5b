"""Rules used by several presets."""

from __future__ import annotations

from fxquant.config.spec import MAX_BITS, MIN_BITS, Granularity, ObserverKind, Scheme, TensorSpec
from fxquant.config.validation import is_whole
from fxquant.config.vocabulary import Arg, End, OpKind
from fxquant.errors import BitWidthError
from fxquant.policies.policy import Rule


def searched_rules(weight_bits: int, act_bits: int, image_bits: int) -> tuple[Rule, ...]:
    """Rules of the presets that search scales.

    Args:
        weight_bits: width of all weights, symmetric per output channel.
        act_bits: width of activations; queries, keys and values symmetric per head.
        image_bits: width of the images that the first layer takes.

    Raises:
        BitWidthError: a width is outside 2..16.
    """
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


def check_act_bits(act_bits: int, scheme: Scheme, call: str) -> None:
    """Checks the width of a preset's activations against the quantizers of a scheme.

    Args:
        act_bits: width of activations; a width that no quantizer has is left to TensorSpec.
        scheme: scheme of some of the activations.
        call: call of the preset that uses uniform quantizers in place of this scheme.

    Raises:
        BitWidthError: the scheme does not allow the width.
    """
    widest = scheme.limits.max_bits
    if is_whole(act_bits) and widest < act_bits <= MAX_BITS:
        raise BitWidthError(
            f"act_bits (--act-bits) must be at most {widest} with {scheme} quantizers, got "
            f"{act_bits}: choose at most {widest} bits, use policies.{call} in Python, or preset "
            f"best, which takes {MIN_BITS} to {MAX_BITS} bits",
            got=act_bits,
            expected=f"{MIN_BITS}..{widest}",
        )


def end_rules(bits: int = 8) -> tuple[Rule, ...]:
    """Rules for the first and last linears and convolutions, often kept at 8 bits.

    These layers are a small part of the network, and their errors affect all of it (BRECQ, arXiv
    2102.05426, section 4). Put a rule for images before these rules.

    Args:
        bits: width of these layers' weights, symmetric per output channel, and of the last layers'
            inputs, asymmetric per tensor.

    Raises:
        BitWidthError: the width is outside 2..16.
    """
    weight = TensorSpec(bits=bits, symmetric=True, granularity=Granularity.CHANNEL)
    return (
        *(Rule(arg=Arg.WEIGHT, end=end, spec=weight, optional=True) for end in End),
        Rule(arg=Arg.INPUT, end=End.LAST, spec=TensorSpec(bits=bits), optional=True),
    )


def elementwise_rules(act_bits: int = 8, *, constant_bits: int = 16) -> tuple[Rule, ...]:
    """Rules for operations between products: additions, norms, softmax, activation functions.

    Args:
        act_bits: width of activations, asymmetric per tensor.
        constant_bits: width of constants that are added: position embeddings, relative position
            biases, attention masks. Quantizing a constant costs no time, and a mask of 0 and -100
            added to scores of a few units needs a fine grid.

    Raises:
        BitWidthError: a width is outside 2..16.
    """
    constants = TensorSpec(bits=constant_bits)
    scores = TensorSpec(bits=act_bits, observer=ObserverKind.SOFTMAX)
    # One spec for additions and norms: the residual stream, which both read, is quantized once.
    stream = TensorSpec(bits=act_bits, observer=ObserverKind.MSE)
    kinds = (OpKind.ADD, OpKind.LAYER_NORM, OpKind.RMS_NORM, OpKind.ACTIVATION)
    return (
        Rule(op=OpKind.ADD, fed_by="parameter", spec=constants, optional=True),
        Rule(op=OpKind.SOFTMAX, spec=scores, optional=True),
        *(Rule(op=kind, spec=stream, optional=True) for kind in kinds),
    )
