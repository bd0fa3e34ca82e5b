"""Which parts of a graph lie before its first quantizer, and which before its last."""

from __future__ import annotations

from torch import fx

from fxquant.graph.sizes import is_number


def fed_by_image(gm: fx.GraphModule) -> dict[fx.Node, None]:
    """The placeholder and what is computed of it before any quantizer, in graph order."""
    found: dict[fx.Node, None] = {}
    for node in gm.graph.nodes:
        tensors = [n for n in node.all_input_nodes if n.op != "get_attr" and not is_number(n)]
        computed = node.op == "call_function" and not is_number(node)
        if node.op == "placeholder" or (computed and tensors and all(n in found for n in tensors)):
            found[node] = None
    return found


def feeding_quantizers(nodes: list[fx.Node]) -> set[fx.Node]:
    """The nodes on a way to a quantizer."""
    found: set[fx.Node] = set()
    for node in reversed(nodes):
        if any(user in found or user.op == "call_module" for user in node.users):
            found.add(node)
    return found
