"""A graph as text for people: one line a node, as ``op target(args)``."""

from __future__ import annotations

from typing import Any

from torch import SymInt, Tensor, fx


def graph_text(gm: fx.GraphModule, *, names: bool = False) -> str:
    """The nodes of a graph, a line each: its number, what it computes, and the result's shape.

    Parameters stand where they are read, with their shapes; the batch size is ``B``.

    Args:
        gm: the graph, with the shapes of an example batch.
        names: show names of nodes too, which mostly come from torch and change with its versions.
    """
    lines: list[str] = []
    shown: dict[fx.Node, str] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            shown[node] = f"{node.target}{_shape(node)}"
            continue
        shown[node] = f"%{len(lines)}"
        name = f" {node.name}" if names and node.op == "call_function" else ""
        lines.append(f"{shown[node]}{name} = {_call(node, shown)}{_result(node)}")
    return "\n".join(lines) + "\n"


def _call(node: fx.Node, shown: dict[fx.Node, str]) -> str:
    target = getattr(node.target, "__name__", node.target)
    arguments = [_argument(value, shown) for value in node.args]
    arguments += [f"{key}={_argument(value, shown)}" for key, value in node.kwargs.items()]
    called = node.op if node.op in ("placeholder", "output") else f"{node.op} {target}"
    return f"{called}({', '.join(arguments)})"


def _argument(value: Any, shown: dict[fx.Node, str]) -> str:
    match value:
        case fx.Node():
            return shown[value]
        case list() | tuple():
            return f"[{', '.join(_argument(item, shown) for item in value)}]"
        case float():
            return f"{value:.6g}"
    return repr(value)


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    return f"[{', '.join('B' if isinstance(n, SymInt) else str(n) for n in value.shape)}]"


def _result(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        return f" : {len(value)} tensors"
    return f" : {_shape(node) or 'number'}" if node.op != "output" else ""
