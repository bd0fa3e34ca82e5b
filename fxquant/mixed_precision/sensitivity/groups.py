"""Edges of an observed graph that share a width, and the cost of their bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from fxquant.config.vocabulary import Arg
from fxquant.graph.edges import Edge
from fxquant.graph.edges import quantized_edges as annotated_edges
from fxquant.graph.macs import MacCounter
from fxquant.graph.meta import PACKED_WEIGHT, PINNED_ARGS
from fxquant.graph.nodes import get_parameter
from fxquant.mixed_precision.allocate.problem import FixedWidth, Product


@dataclass(frozen=True)
class EdgeGroup:
    """Edges that must share a width.

    Activations that go through one observer; weights that are one parameter, or were cut from one
    packed parameter (q, k and v of a projection, marked by SplitProjections).
    """

    edges: tuple[Edge, ...]

    @property
    def name(self) -> str:
        """Name of the first edge."""
        return self.edges[0].name

    @property
    def is_weight(self) -> bool:
        """Whether the edges are weights; otherwise they are activations."""
        return self.edges[0].arg is Arg.WEIGHT

    @property
    def sources(self) -> list[fx.Node]:
        """The nodes that the edges read, each listed once."""
        return list(dict.fromkeys(edge.source for edge in self.edges))


class WidthGroups:
    """Groups and costs of an observed graph.

    Args:
        gm: in stage OBSERVED.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm, self._macs = gm, MacCounter(gm)
        groups: dict[tuple[str, ...], list[Edge]] = {}
        operands = list(_operands(gm))
        pinned = {e.source for e in operands if _pinned(e) and e.arg is not Arg.WEIGHT}
        # An observer that an addition or a norm reads as well stays at the width of the rules.
        pinned |= {e.source for e in annotated_edges(gm) if not e.kind.is_product}
        fixed: dict[tuple[str, ...], list[Edge]] = {}
        for edge in operands:
            if edge.source in pinned or _pinned(edge):
                fixed.setdefault((str(edge.source.target),), []).append(edge)
            else:
                groups.setdefault(_key(edge), []).append(edge)
        self.groups = tuple(EdgeGroup(tuple(group)) for group in groups.values())
        self._fixed = [EdgeGroup(tuple(group)) for group in fixed.values()]

    def values(self, group: EdgeGroup) -> int:
        """Number of values of a group, for activations those of one image."""
        if group.is_weight:
            return sum(get_parameter(self._gm, node).numel() for node in group.sources)
        return sum(self._macs.values(node) for node in group.sources)

    @property
    def fixed(self) -> tuple[FixedWidth, ...]:
        """Quantizers that keep the width of their rule."""
        return tuple(
            FixedWidth(
                name=group.name,
                is_weight=group.is_weight,
                values=self.values(group),
                bits=_bits(group.edges[0]),
            )
            for group in self._fixed
        )

    @property
    def products(self) -> tuple[Product, ...]:
        """Products of two quantized operands."""
        names = {edge.name: group.name for group in self.groups for edge in group.edges}
        operands: dict[fx.Node, list[str | int]] = {}
        for edge in _operands(self._gm):
            operands.setdefault(edge.node, []).append(names.get(edge.name, _bits(edge)))
        return tuple(
            Product(macs=self._macs.macs(node), left=pair[0], right=pair[1])
            for node, pair in operands.items()
            if len(pair) == 2
        )

    def macs_after_groups(self) -> int:
        """Multiplications for one image of the nodes behind each group, summed over groups."""
        order = {node: i for i, node in enumerate(self._gm.graph.nodes)}
        return self._macs.macs_after(
            min((edge.node for edge in group.edges), key=order.__getitem__) for group in self.groups
        )


def _operands(gm: fx.GraphModule) -> Iterator[Edge]:
    """Annotated operands of products; other edges keep the width of their rule."""
    return (edge for edge in annotated_edges(gm) if edge.kind.is_product)


def _pinned(edge: Edge) -> bool:
    return edge.arg in (PINNED_ARGS.get(edge.node) or ())


def _bits(edge: Edge) -> int:
    assert edge.spec is not None
    return edge.spec.bits


def _key(edge: Edge) -> tuple[str, ...]:
    packed = PACKED_WEIGHT.get(edge.node)
    if edge.arg is Arg.WEIGHT and packed is not None:
        return "packed", packed
    return (str(edge.source.target),)
