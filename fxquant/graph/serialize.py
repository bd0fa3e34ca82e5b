"""Graphs as plain JSON, and back, without pickle and without code.

Each node is written with its name, kind, target and arguments. A target is the name of a torch
operator or of one of the few Python functions that compute sizes.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx, nn

from fxquant.errors import FileFormatError, FxQuantError
from fxquant.graph.meta import MODULE_PATH

_FUNCTION_NAMES = {
    operator: "getitem add sub mul floordiv truediv mod neg pow eq ne lt le gt ge and_ or_",
    math: "ceil floor trunc",
    torch: "sym_max sym_min sym_int sym_float sym_ite sym_not sym_sqrt",
}
_FUNCTIONS: dict[str, Any] = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module, names in _FUNCTION_NAMES.items()
    for name in names.split()
}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}


def graph_to_json(graph: fx.Graph) -> list[dict[str, Any]]:
    """The nodes of a graph in order.

    Raises:
        FxQuantError: a node holds something that JSON cannot express.
    """
    return [
        {
            "name": node.name,
            "op": node.op,
            "target": _target_name(node),
            "args": _encode(node.args),
            "kwargs": {key: _encode(value) for key, value in node.kwargs.items()},
            **({"path": path} if (path := MODULE_PATH.get(node)) is not None else {}),
        }
        for node in graph.nodes
    ]


def graph_from_json(nodes: list[dict[str, Any]]) -> fx.Graph:
    """Rebuilds a graph from ``graph_to_json``.

    Raises:
        FileFormatError: an entry is malformed or names an unknown operator.
    """
    graph, nodes_by_name = fx.Graph(), dict[str, fx.Node]()
    for entry in nodes:
        try:
            node = graph.create_node(
                entry["op"],
                _target(entry["op"], entry["target"]),
                _decode(entry["args"], nodes_by_name),
                {k: _decode(value, nodes_by_name) for k, value in entry["kwargs"].items()},
                name=entry["name"],
            )
            if "path" in entry:
                MODULE_PATH.set(node, str(entry["path"]))
            nodes_by_name[entry["name"]] = node
        except (KeyError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
            raise FileFormatError(
                f"graph node {entry!r:.200} is malformed ({type(error).__name__}: {error}); "
                "the file is damaged or of another version: compile the model again",
                got=entry,
            ) from error
    return graph


def set_tensor(root: nn.Module, name: str, value: torch.Tensor) -> None:
    """Registers a buffer under a dotted name, with the modules that the name needs."""
    *parents, leaf = name.split(".")
    for parent in parents:
        if not isinstance(getattr(root, parent, None), nn.Module):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    root.register_buffer(leaf, value)


def _target_name(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    if node.target in _NAMES:
        return _NAMES[node.target]
    raise FxQuantError(
        f"{node.name}: {node.target} cannot be saved: it is not a torch operator",
        edge=node.name,
        got=node.target,
    )


def _target(op: str, name: str) -> Any:
    if op != "call_function":
        return name
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    namespace, operation, overload = name.split(".") if name.count(".") == 2 else ("", "", "")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), operation), overload)
    except (AttributeError, RuntimeError) as error:
        raise FileFormatError(
            f"operator {name!r} is unknown to this torch ({torch.__version__}); import the "
            "package that registers it, or upgrade torch",
            got=name,
        ) from error


def _encode(value: Any) -> Any:
    match value:
        case fx.Node():
            return {"node": value.name}
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": str(value)}
        case tuple():
            return {"tuple": [_encode(item) for item in value]}
        case list():
            return [_encode(item) for item in value]
        case dict():
            return {"dict": {str(key): _encode(item) for key, item in value.items()}}
        case slice():
            return {"slice": [_encode(v) for v in (value.start, value.stop, value.step)]}
        case torch.dtype() | torch.memory_format() | torch.layout():
            return {"torch": str(value).removeprefix("torch.")}
        case torch.device():
            return {"device": str(value)}
    raise FxQuantError(
        f"an argument of type {type(value).__name__} cannot be saved: {value!r}", got=value
    )


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    match kind:
        case "node":
            return nodes[inner]
        case "float":
            return float(inner)
        case "tuple":
            return tuple(_decode(item, nodes) for item in inner)
        case "dict":
            return {key: _decode(item, nodes) for key, item in inner.items()}
        case "slice":
            return slice(*(_decode(item, nodes) for item in inner))
        case "torch":
            return _torch_constant(inner)
        case "device":
            return torch.device(inner)
    raise FileFormatError(f"argument kind {kind!r} is unknown to this version of fxquant", got=kind)


def _torch_constant(name: str) -> Any:
    value = getattr(torch, name, None)
    if not isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        raise FileFormatError(f"torch.{name} is not a dtype, layout or memory format", got=name)
    return value
