"""Records of how channels flow through a graph: streams, and everything that they touch.

A *stream* is a set of values that turn together. Each linear and each convolution begins a stream
of its output channels. Sums, concatenations, data movement and norms over exactly the channels pass
streams on and join them. Where a stream ends, its reader is either a *consumer*, a product whose
columns can undo the rotation, or an *exit*, which needs the values as they were. A value from
outside that is added to a stream is an *entry*.

The weight and bias of a norm are folded into the consumers of its output. Where this is impossible,
as the output is added to another value, the norm itself is an entry: a new stream begins behind it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxquant.graph.dialect import aten
from fxquant.graph.nodes import constant, operand
from fxquant.rotation.layout import Layout

NORMS = (aten.layer_norm.default, aten.rms_norm.default)
# A weight below this share of the largest one is too small to divide the bias by.
_LEAST_WEIGHT_RATIO = 1e-3


@dataclass(frozen=True)
class Carrier:
    """A stream's channels in a value.

    Attributes:
        stream: number of the stream.
        layout: where the channels are.
        norm: the norm whose output the value is, behind operations that pass it on; its weight and
            bias are still to be folded into the readers. None elsewhere.
        shift_exact: whether the norm's bias reaches every element of the value unchanged, and can
            be folded into a reader's bias; it does not where zeros are padded.
    """

    stream: int
    layout: Layout
    norm: fx.Node | None = None
    shift_exact: bool = True


@dataclass(frozen=True)
class Scale:
    """A multiplication of a product's output by a constant per channel, such as LayerScale.

    Attributes:
        node: the multiplication.
        value: the operand that is scaled: the product's output, moved.
        product: the product, whose output nothing else reads.
        factor: ``(out,)``.
    """

    node: fx.Node
    value: fx.Node
    product: fx.Node
    factor: Tensor


@dataclass(frozen=True)
class NormReader:
    """A norm that reads a stream.

    Attributes:
        node: a layer norm or an rms norm.
        carrier: the channels in its input.
        entry: number of the stream that begins behind it; None where its weight and bias are
            folded into its readers.
    """

    node: fx.Node
    carrier: Carrier
    entry: int | None


@dataclass
class Flow:
    """All that streams touch.

    Attributes:
        producers: linears and convolutions, with the stream of their output channels.
        consumers: products that read a stream, with the channels in their input.
        constants: parameters and buffers that a stream contains, with their channels.
        scales: multiplications to fold into producers.
        norms: norms that read a stream.
        exits: values that other operations read, with their channels and these readers.
        entries: values from outside, the channels that they are added to, and the additions.
    """

    producers: dict[fx.Node, int] = field(default_factory=dict)
    consumers: list[tuple[fx.Node, Carrier]] = field(default_factory=list)
    constants: dict[fx.Node, Carrier] = field(default_factory=dict)
    scales: list[Scale] = field(default_factory=list)
    norms: dict[fx.Node, NormReader] = field(default_factory=dict)
    exits: dict[fx.Node, tuple[Carrier, list[fx.Node]]] = field(default_factory=dict)
    entries: list[tuple[fx.Node, Carrier, fx.Node]] = field(default_factory=list)
    joined: list[int] = field(default_factory=list)

    def stream(self, number: int) -> int:
        """The number that stands for all streams joined with one."""
        while self.joined[number] != number:
            number = self.joined[number]
        return number

    def readers_of(self, norm: fx.Node) -> list[tuple[fx.Node, Carrier]]:
        """The consumers and exits behind a norm, each with the channels that it reads."""
        exits = [(node, carrier) for node, (carrier, _) in self.exits.items()]
        return [(n, c) for n, c in (*self.consumers, *exits) if c.norm is norm]


def norm_parameters(gm: fx.GraphModule, norm: fx.Node) -> tuple[Tensor, Tensor]:
    """The weight and the bias of a norm in float64, ones and zeros where it has none.

    Args:
        gm: the graph.
        norm: a layer norm or an rms norm with constant parameters.

    Returns:
        Two tensors ``(C,)``.
    """
    has_bias = norm.target is aten.layer_norm.default and len(norm.args) > 3
    weight = constant(gm, norm.args[2]) if len(norm.args) > 2 else None
    bias = constant(gm, norm.args[3]) if has_bias else None
    size = int(operand(norm, 0).meta["val"].shape[-1])
    known = weight if weight is not None else bias
    device = None if known is None else known.device
    ones = torch.ones(size, dtype=torch.float64, device=device)
    return (
        ones if weight is None else weight.detach().double(),
        torch.zeros_like(ones) if bias is None else bias.detach().double(),
    )


def bias_before_weight(weight: Tensor, bias: Tensor) -> Tensor | None:
    """The vector ``b`` with ``(x + b) weight = x weight + bias``, None where a weight is too small.

    Args:
        weight: ``(C,)``.
        bias: ``(C,)``.
    """
    tiny = weight.abs() <= _LEAST_WEIGHT_RATIO * weight.abs().max()
    if bool((tiny & (bias != 0)).any()):
        return None
    return torch.where(tiny, 0.0, bias / torch.where(tiny, 1.0, weight))
