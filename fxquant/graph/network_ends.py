"""Which products stand at the ends of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx

from fxquant.config.vocabulary import End
from fxquant.graph.dialect import op_kind
from fxquant.graph.sizes import is_number


def is_first_or_last_product(node: fx.Node, end: End) -> bool:
    """Whether a product is among the first, or among the last, of its network.

    A first product reads images that no other product has seen; after a last one comes no product.
    What a distilled model averages are two last products. Sizes of values do not count as values.

    Args:
        node: a product.
        end: which of the two.
    """
    if end is End.FIRST:
        before = _reached(node, lambda n: n.all_input_nodes)
        return before is not None and any(n.op == "placeholder" for n in before)
    return _reached(node, lambda n: n.users) is not None


def _reached(start: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node] | None:
    """All that is reached from a node by steps; None where a product is among it."""
    found: set[fx.Node] = set()
    left = list(step(start))
    while left:
        node = left.pop()
        if op_kind(node) is not None:
            return None
        if node not in found and not is_number(node):
            found.add(node)
            left.extend(step(node))
    return found
