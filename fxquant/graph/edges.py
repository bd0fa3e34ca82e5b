"""Edges: the arguments of operations that quantization is annotated on.

Each quantizable operation is one ``call_function`` node of a plain aten operator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fxquant.config.spec import Granularity, TensorSpec
from fxquant.config.vocabulary import Arg, OpKind
from fxquant.graph.dialect import OPERANDS, PRODUCERS, aten, elementwise_kind, op_kind
from fxquant.graph.meta import QUANT_SPECS
from fxquant.graph.nodes import module_path, operand, skip_data_movement
from fxquant.graph.softmax import is_deferred_softmax


@dataclass(frozen=True)
class Edge:
    """An argument of a quantizable operation, on which quantization is annotated."""

    node: fx.Node
    arg: Arg

    @property
    def kind(self) -> OpKind:
        """Kind of the consuming operation."""
        kind = op_kind(self.node) or elementwise_kind(self.node)
        assert kind is not None
        return kind

    @property
    def index(self) -> int:
        """Position of the argument in ``node.args``."""
        return OPERANDS[self.kind][self.arg]

    @property
    def source(self) -> fx.Node:
        """The node that the argument is, which may be a call of an observer or quantizer."""
        return operand(self.node, self.index)

    @property
    def name(self) -> str:
        """Unique name, from the module path: ``blocks_0_attn_proj__input``."""
        return f"{self.node.name}__{self.arg}"

    @property
    def path(self) -> str:
        """Path of the module that the operation belongs to: ``blocks.0.attn.proj``."""
        return module_path(self.node)

    @property
    def spec(self) -> TensorSpec | None:
        """The annotation, None where the edge stays float."""
        return (QUANT_SPECS.get(self.node) or {}).get(self.arg)

    @property
    def scale_axis(self) -> int | None:
        """Axis along which each index has its own scale; None per tensor and on a float edge.

        0 for the output channels of a weight; -1 for the channels of an activation, 1 for those of
        a convolution's input; -3 for heads.
        """
        return None if self.spec is None else self.axis_of(self.spec.granularity)

    def axis_of(self, granularity: Granularity) -> int | None:
        """The ``scale_axis`` that the edge would have with a granularity."""
        if granularity is Granularity.TENSOR:
            return None
        if granularity is Granularity.HEAD:
            return -3
        if self.arg is Arg.WEIGHT:
            return 0
        return 1 if self.kind is OpKind.CONV else -1

    def annotate(self, spec: TensorSpec) -> None:
        """Sets the annotation, in a new mapping: copies of a graph share the old one."""
        QUANT_SPECS.set(self.node, {**(QUANT_SPECS.get(self.node) or {}), self.arg: spec})

    def replace_source(self, new: fx.Node) -> None:
        """Feeds this edge, and no other, from ``new``."""
        self.node.update_arg(self.index, new)


def possible_edges(gm: fx.GraphModule) -> Iterator[Edge]:
    """Yields the edges that a rule can quantize, in graph order.

    The result has all edges of products, and edges of elementwise operations that read a float
    tensor.
    """
    for node in list(gm.graph.nodes):
        kind = op_kind(node) or elementwise_kind(node)
        if kind is None:
            continue
        for arg, index in OPERANDS[kind].items():
            if kind.is_product or _is_float(node.args[index]):
                yield Edge(node, arg)


def edges(gm: fx.GraphModule) -> Iterator[Edge]:
    """The edges of products and annotated edges of elementwise operations, in graph order."""
    return (edge for edge in possible_edges(gm) if edge.kind.is_product or edge.spec is not None)


def quantized_edges(gm: fx.GraphModule) -> Iterator[Edge]:
    """The edges that carry an annotation."""
    return (edge for edge in edges(gm) if edge.spec is not None)


def _is_float(value: Any) -> bool:
    """Whether an argument is a node that yields a float tensor, a quantized one included."""
    val = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(val, Tensor) and val.is_floating_point()


def fed_by(edge: Edge) -> str:
    """Name of what computed the values on an edge.

    The name is ``softmax``, ``gelu``, ``linear``, ``image`` or another of ``PRODUCER_NAMES``, for
    other operations the name of the aten operator. Data movement and masks that fill in zeros are
    skipped.
    """
    source = skip_data_movement(edge.source)
    if source.target is aten.masked_fill.Scalar and source.args[2] == 0:
        source = skip_data_movement(operand(source, 0))
    if source.op == "placeholder":
        return "image"
    if source.op == "get_attr":
        return "parameter"
    if is_deferred_softmax(source):
        return "softmax"
    kind = op_kind(source)
    if kind is not None:
        return str(kind)
    return PRODUCERS.get(source.target, getattr(source.target, "__name__", "?").split(".")[0])
