"""What passes ask of a graph: operations, edges, producers, paths.

The dialect is plain aten: each quantizable operation is one ``call_function`` node.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.errors import PassError
from fxquant.shapes import example_size
from fxquant.spec import Arg, Granularity, OpKind, Stage, TensorSpec

aten = torch.ops.aten
_TORCH_FOLDER = str(Path(torch.__file__).parent)

_OP_KINDS: dict[Any, OpKind] = {
    aten.linear.default: OpKind.LINEAR,
    aten.conv1d.default: OpKind.CONV,
    aten.conv1d.padding: OpKind.CONV,
    aten.conv2d.default: OpKind.CONV,
    aten.conv2d.padding: OpKind.CONV,
    aten.conv3d.default: OpKind.CONV,
    aten.conv3d.padding: OpKind.CONV,
    aten.matmul.default: OpKind.MATMUL,
}

_ARGS: dict[OpKind, dict[Arg, int]] = {
    OpKind.LINEAR: {Arg.INPUT: 0, Arg.WEIGHT: 1},
    OpKind.CONV: {Arg.INPUT: 0, Arg.WEIGHT: 1},
    OpKind.MATMUL: {Arg.LHS: 0, Arg.RHS: 1},
    OpKind.LAYER_NORM: {Arg.INPUT: 0},
    OpKind.RMS_NORM: {Arg.INPUT: 0},
    OpKind.SOFTMAX: {Arg.INPUT: 0},
    OpKind.ACTIVATION: {Arg.INPUT: 0},
    OpKind.ADD: {Arg.LHS: 0, Arg.RHS: 1},
}

_ACTIVATION_NAMES = "gelu silu relu relu6 hardswish hardsigmoid sigmoid tanh elu leaky_relu mish"
_ELEMENTWISE_KINDS: dict[Any, OpKind] = {
    aten.layer_norm.default: OpKind.LAYER_NORM,
    aten.rms_norm.default: OpKind.RMS_NORM,
    aten.softmax.int: OpKind.SOFTMAX,
    aten._softmax.default: OpKind.SOFTMAX,
    aten.add.Tensor: OpKind.ADD,
    **{getattr(aten, name).default: OpKind.ACTIVATION for name in _ACTIVATION_NAMES.split()},
}

# Products that the dialect has no quantized form of. They are reported, never passed over.
_UNSUPPORTED_NAMES = (
    "conv_transpose1d conv_transpose2d conv_transpose3d convolution conv_tbc bilinear tensordot "
    "inner mv dot vdot addmv addbmm chain_matmul linalg_multi_dot lstm gru rnn_tanh rnn_relu "
    "lstm_cell gru_cell embedding_bag cdist einsum"
)
UNSUPPORTED: dict[Any, str] = {
    getattr(getattr(aten, name), overload): f"left float: {name} has no quantized form yet"
    for name in _UNSUPPORTED_NAMES.split()
    for overload in getattr(aten, name).overloads()
}

# Operations that move values and never change them.
MOVES: frozenset[Any] = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.expand.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.unbind.int,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.roll.default,
        aten.pad.default,
        operator.getitem,
    }
)

_PRODUCERS: dict[Any, str] = {
    aten.softmax.int: "softmax",
    aten._softmax.default: "softmax",
    aten.gelu.default: "gelu",
    aten.silu.default: "silu",
    aten.relu.default: "relu",
    aten.relu6.default: "relu",
    aten.hardswish.default: "hardswish",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.layer_norm.default: "layer_norm",
    aten.rms_norm.default: "rms_norm",
    aten.group_norm.default: "group_norm",
    aten.batch_norm.default: "batch_norm",
    aten._native_batch_norm_legit_no_training.default: "batch_norm",
    aten.add.Tensor: "add",
    aten.mul.Tensor: "mul",
    aten.cat.default: "cat",
    aten.mean.dim: "mean",
    aten.adaptive_avg_pool1d.default: "mean",
    aten.adaptive_avg_pool2d.default: "mean",
}

PRODUCER_NAMES: frozenset[str] = frozenset(
    {*_PRODUCERS.values(), *(str(k) for k in OpKind if k.is_product), "image", "parameter"}
)


@dataclass(frozen=True)
class Edge:
    """An input of a quantizable operation: where quantization is annotated."""

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
        return _ARGS[self.kind][self.arg]

    @property
    def source(self) -> fx.Node:
        """The node that the argument comes from, a quantizer call included."""
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
        spec = self.node.meta.get("quant", {}).get(self.arg)
        assert spec is None or isinstance(spec, TensorSpec)
        return spec

    @property
    def scale_axis(self) -> int | None:
        """Axis that gets a scale each, None per tensor and where the edge stays float.

        0 for the output channels of a weight; for the channels of an activation -1, or 1 at a
        convolution; -3 for heads.
        """
        return None if self.spec is None else self.axis_of(self.spec.granularity)

    def axis_of(self, granularity: Granularity) -> int | None:
        """Axis that would get a scale each at that granularity; as ``scale_axis``."""
        if granularity is Granularity.TENSOR:
            return None
        if granularity is Granularity.HEAD:
            return -3
        if self.arg is Arg.WEIGHT:
            return 0
        return 1 if self.kind is OpKind.CONV else -1

    def replace_source(self, new: fx.Node) -> None:
        """Feeds this edge, and no other, from ``new``."""
        self.node.update_arg(self.index, new)


def op_kind(node: fx.Node) -> OpKind | None:
    """Kind of a product, None for any other node."""
    return _OP_KINDS.get(node.target) if node.op == "call_function" else None


def elementwise_kind(node: fx.Node) -> OpKind | None:
    """Kind of a norm, softmax, activation function or addition, None for any other node."""
    return _ELEMENTWISE_KINDS.get(node.target) if node.op == "call_function" else None


def possible_edges(gm: fx.GraphModule) -> Iterator[Edge]:
    """Everything that a rule can quantize, in graph order.

    Of products all edges; of elementwise operations those that read a float tensor.
    """
    for node in list(gm.graph.nodes):
        kind = op_kind(node) or elementwise_kind(node)
        if kind is None:
            continue
        for arg, index in _ARGS[kind].items():
            if kind.is_product or _is_float(node.args[index]):
                yield Edge(node, arg)


def edges(gm: fx.GraphModule) -> Iterator[Edge]:
    """All edges of products and the annotated ones of elementwise operations, in graph order."""
    return (edge for edge in possible_edges(gm) if edge.kind.is_product or edge.spec is not None)


def quantized_edges(gm: fx.GraphModule) -> Iterator[Edge]:
    """The edges that carry an annotation."""
    return (edge for edge in edges(gm) if edge.spec is not None)


def _is_float(value: Any) -> bool:
    """Whether an argument is a node that yields a float tensor, a quantized one included."""
    val = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(val, Tensor) and val.is_floating_point()


def through_moves(node: fx.Node) -> fx.Node:
    """Follows data back through operations that only move it, quantizers and observers too."""
    while node.op == "call_module" or (node.op == "call_function" and node.target in MOVES):
        node = node.all_input_nodes[0]
    return node


def operand(node: fx.Node, index: int) -> fx.Node:
    """The argument of ``node`` at a position where there must be a node."""
    value = node.args[index]
    assert isinstance(value, fx.Node)
    return value


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an aten operator by name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema}
    given = dict(zip((argument.name for argument in schema), node.args, strict=False))
    return {**defaults, **given, **node.kwargs}


def data_users(node: fx.Node) -> list[fx.Node]:
    """The users of a node's values; those that ask for its size alone are left out."""
    return [user for user in node.users if user.target is not aten.sym_size.int]


def replay(node: fx.Node, start: fx.Node, value: Tensor, memo: dict[fx.Node, Any]) -> Any:
    """What ``node`` yields when ``start`` yields ``value``; sizes take their example values.

    Run on a tensor of numbers, moves tell where each value went, whatever moves they are.

    Args:
        node: reached from ``start`` through moves.
        start: the node whose value is given.
        value: of the shape that ``start`` has for the example batch.
        memo: values of nodes on the way, kept for further calls with the same ``start``.
    """
    if node is start:
        return value
    if node not in memo:
        if not isinstance(node.meta.get("val"), torch.Tensor | list | tuple):
            memo[node] = example_size(node.meta["val"])
        else:
            args = fx.map_arg(node.args, lambda n: replay(n, start, value, memo))
            memo[node] = node.target(*args, **node.kwargs)  # type: ignore[operator]
    return memo[node]


def fed_by(edge: Edge) -> str:
    """Name of what computed the values on an edge.

    ``softmax``, ``gelu``, ``linear``, ``image`` and the like (``PRODUCER_NAMES``), data movement
    and zeros filled in looked through. An operation without a name of its own gives its aten name.
    """
    source = through_moves(edge.source)
    if source.target is aten.masked_fill.Scalar and source.args[2] == 0:
        source = through_moves(operand(source, 0))
    if source.op == "placeholder":
        return "image"
    if source.op == "get_attr":
        return "parameter"
    kind = op_kind(source)
    if kind is not None:
        return str(kind)
    return _PRODUCERS.get(source.target, getattr(source.target, "__name__", "?").split(".")[0])


def module_path(node: fx.Node) -> str:
    """Path of the user's module that a node came from; empty for the model itself."""
    if "path" in node.meta:
        return str(node.meta["path"])
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return re.sub(r"^L\['self'\]\.?", "", str(path))


def source_line(node: fx.Node) -> str:
    """The innermost line outside torch that made a node, or an empty string."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    own = [line for line in lines if not line.startswith(f'File "{_TORCH_FOLDER}')]
    return own[-1] if own else ""


def stage(gm: fx.GraphModule) -> Stage:
    """The stage the graph is in."""
    return Stage(gm.meta["stage"])


def get_parameter(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    """The tensor behind a ``get_attr`` node."""
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor):
        raise PassError(f"{node.target} is no tensor but {type(value).__name__}")
    return value


def constant(gm: fx.GraphModule, node: Any) -> Tensor | None:
    """The tensor if ``node`` reads a parameter or buffer, else None."""
    if isinstance(node, fx.Node) and node.op == "get_attr":
        return get_parameter(gm, node)
    return None


def rank(node: fx.Node) -> int:
    """Number of dimensions of the tensor a node yields."""
    return int(node.meta["val"].ndim)


def submodule(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a ``call_module`` node calls, else None."""
    return gm.get_submodule(str(node.target)) if node.op == "call_module" else None
