"""Partition of a graph: the nodes before its first quantizer, and the nodes before its last."""

from __future__ import annotations

from torch import fx

from fxquant.graph.sizes import is_number


def fed_by_image(gm: fx.GraphModule) -> dict[fx.Node, None]:
    """The placeholder and the nodes computed from it before any quantizer, in graph order."""
    fed: dict[fx.Node, None] = {}
    for node in gm.graph.nodes:
        tensors = [n for n in node.all_input_nodes if n.op != "get_attr" and not is_number(n)]
        computed = node.op == "call_function" and not is_number(node)
        if node.op == "placeholder" or (computed and tensors and all(n in fed for n in tensors)):
            fed[node] = None
    return fed


def feeding_quantizers(nodes: list[fx.Node]) -> set[fx.Node]:
    """The nodes from which a path leads to a quantizer."""
    feeding: set[fx.Node] = set()
    for node in reversed(nodes):
        if any(user in feeding or user.op == "call_module" for user in node.users):
            feeding.add(node)
    return feeding
