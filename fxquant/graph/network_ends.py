"""The ends of a network: its first and its last products."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx

from fxquant.config.vocabulary import End
from fxquant.graph.dialect import op_kind
from fxquant.graph.sizes import is_number


def is_first_or_last_product(node: fx.Node, end: End) -> bool:
    """Whether a product is among the first, or among the last, of its network.

    A first product reads the image through no other product; no product reads the values of a last
    one. A distilled model, which averages two heads, has two last products. Reading the size of a
    value does not count as reading the value.

    Args:
        node: a product.
        end: which of the two ends.
    """
    if end is End.FIRST:
        before = _reachable(node, lambda n: n.all_input_nodes)
        return before is not None and any(n.op == "placeholder" for n in before)
    return _reachable(node, lambda n: n.users) is not None


def _reachable(start: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node] | None:
    """The nodes that steps lead to from a node; None where they include a product."""
    reached: set[fx.Node] = set()
    pending = list(step(start))
    while pending:
        node = pending.pop()
        if op_kind(node) is not None:
            return None
        if node not in reached and not is_number(node):
            reached.add(node)
            pending.extend(step(node))
    return reached
