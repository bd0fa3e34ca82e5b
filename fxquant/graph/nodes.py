"""What passes ask of a node: operands, users, module path, parameter, stage of its graph."""

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
    """Follows data back through operations that only move it, quantizers and observers too."""
    while node.op == "call_module" or (
        node.op == "call_function" and node.target in DATA_MOVEMENT_OPS
    ):
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


def evaluate_moves(node: fx.Node, start: fx.Node, value: Tensor, memo: dict[fx.Node, Any]) -> Any:
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
        if is_number(node):
            memo[node] = example_size(node.meta["val"])
        else:
            args = fx.map_arg(node.args, lambda n: evaluate_moves(n, start, value, memo))
            memo[node] = node.target(*args, **node.kwargs)  # type: ignore[operator]
    return memo[node]


def module_path(node: fx.Node) -> str:
    """Path of the user's module that a node came from; empty for the model itself."""
    saved = MODULE_PATH.get(node)
    if saved is not None:
        return saved
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
    """Stage of the graph.

    Raises:
        PassError: the graph has none.
    """
    value = STAGE.get(gm)
    if value is None:
        raise PassError("the graph has no stage: get one with fxquant.graph.capture.capture")
    return value


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
