"""Queries of a node: operands, users, module path, parameter, stage of its graph."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.config.vocabulary import Stage
from fxquant.errors import PassError
from fxquant.graph.dialect import DATA_MOVEMENT_OPS, aten
from fxquant.graph.meta import MODULE_PATH, STAGE
from fxquant.graph.shapes import example_size
from fxquant.graph.sizes import is_number

_TORCH_FOLDER = str(Path(torch.__file__).parent)


def skip_data_movement(node: fx.Node) -> fx.Node:
    """The node that values come from, before data movement, quantizers and observers."""
    while node.op == "call_module" or (
        node.op == "call_function" and node.target in DATA_MOVEMENT_OPS
    ):
        node = node.all_input_nodes[0]
    return node


def operand(node: fx.Node, index: int) -> fx.Node:
    """The argument of ``node`` at a position; the argument must be a node."""
    value = node.args[index]
    assert isinstance(value, fx.Node)
    return value


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an aten operator by name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema}
    positional = dict(zip((argument.name for argument in schema), node.args, strict=False))
    return {**defaults, **positional, **node.kwargs}


def data_users(node: fx.Node) -> list[fx.Node]:
    """Users that read the values of a node, and not its size alone."""
    return [user for user in node.users if user.target is not aten.sym_size.int]


def moved_readers(source: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The readers of a value behind data movement, each with the node that it reads."""
    readers, pending = [], [source]
    for node in pending:
        for user in data_users(node):
            if user.target in DATA_MOVEMENT_OPS:
                pending.append(user)
            else:
                readers.append((user, node))
    return readers


def operation_name(node: fx.Node) -> str:
    """Name of a node's operation for people: ``linear``, without namespace and overload."""
    return str(getattr(node.target, "__name__", node.op)).split(".")[0]


def evaluate_moves(node: fx.Node, start: fx.Node, value: Tensor, memo: dict[fx.Node, Any]) -> Any:
    """Value of ``node`` when ``start`` yields ``value``, by running the data movement in between.

    With a tensor that numbers its own elements as ``value``, the result shows where each element
    went, whatever the operations are. Sizes have their example values.

    Args:
        node: the node asked for, to which data movement alone leads from ``start``.
        start: the node that ``value`` replaces.
        value: of the shape that ``start`` has for the example batch.
        memo: values of nodes in between; pass the same one again for the same ``start``.
    """
    if node is start:
        return value
    if node not in memo:
        if is_number(node):
            memo[node] = example_size(node.meta["val"])
        else:
            args = fx.map_arg(node.args, lambda n: evaluate_moves(n, start, value, memo))
            memo[node] = node.target(*args, **node.kwargs)  # type: ignore[operator]
    return memo[node]


def module_path(node: fx.Node) -> str:
    """Path of the user's module that a node comes from; empty for the model itself."""
    saved = MODULE_PATH.get(node)
    if saved is not None:
        return saved
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return re.sub(r"^L\['self'\]\.?", "", str(path))


def source_line(node: fx.Node) -> str:
    """The innermost source line outside torch that a node comes from, empty where unknown."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    outside = [line for line in lines if not line.startswith(f'File "{_TORCH_FOLDER}')]
    return outside[-1] if outside else ""


def stage(gm: fx.GraphModule) -> Stage:
    """Stage of the graph.

    Raises:
        PassError: the graph has none.
    """
    value = STAGE.get(gm)
    if value is None:
        raise PassError("the graph has no stage: get one with fxquant.graph.capture.capture")
    return value


def get_parameter(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    """The tensor that a ``get_attr`` node reads.

    Raises:
        PassError: the node reads something else.
    """
    value: Any = gm
    for name in str(node.target).split("."):
        value = getattr(value, name)
    if not isinstance(value, Tensor):
        raise PassError(
            f"{node.target} must be a tensor, got {type(value).__name__}",
            edge=str(node.target),
            got=value,
            expected=Tensor,
        )
    return value


def constant(gm: fx.GraphModule, node: Any) -> Tensor | None:
    """The parameter or buffer that ``node`` reads, None where it is something else."""
    if isinstance(node, fx.Node) and node.op == "get_attr":
        return get_parameter(gm, node)
    return None


def rank(node: fx.Node) -> int:
    """Number of dimensions of the tensor that a node yields."""
    return int(node.meta["val"].ndim)


def submodule(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a ``call_module`` node calls, else None."""
    return gm.get_submodule(str(node.target)) if node.op == "call_module" else None
