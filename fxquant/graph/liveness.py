"""Liveness of values: the last node that reads a value, after which the value can be dropped."""

from __future__ import annotations

from collections.abc import Container, Iterable

from torch import fx


def last_readers(nodes: Iterable[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The last of ``nodes``, in the order of the graph, that reads each value."""
    return {source: node for node in nodes for source in node.all_input_nodes}


def dead_after(
    nodes: Iterable[fx.Node], values: Container[fx.Node] | None = None
) -> dict[fx.Node, list[fx.Node]]:
    """The values that no node reads after each node.

    Args:
        nodes: in the order of the graph.
        values: the values asked for; None for all.

    Returns:
        Node -> the values that it is the last one of ``nodes`` to read; nodes without are left out.
    """
    dead: dict[fx.Node, list[fx.Node]] = {}
    for value, reader in last_readers(nodes).items():
        if values is None or value in values:
            dead.setdefault(reader, []).append(value)
    return dead
