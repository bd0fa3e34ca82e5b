"""Which edges of an observed graph share a width, and what a bit of each costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, fx

from fxquant.allocate.problem import Fixed, Product
from fxquant.graph import Edge, edges, example_size, get_parameter, op_kind, operand
from fxquant.graph import quantized_edges as annotated_edges
from fxquant.spec import Arg


@dataclass(frozen=True)
class EdgeGroup:
    """Edges that must share a width.

    Activations that go through one observer; weights that are one parameter or were cut from one
    (q, k and v of a packed projection, marked by SplitProjections).
    """

    edges: tuple[Edge, ...]

    @property
    def name(self) -> str:
        """That of the first edge."""
        return self.edges[0].name

    @property
    def is_weight(self) -> bool:
        """Weights, else activations."""
        return self.edges[0].arg is Arg.WEIGHT

    @property
    def sources(self) -> list[fx.Node]:
        """The nodes that the edges read, each once."""
        return list(dict.fromkeys(edge.source for edge in self.edges))


class Layout:
    """Groups and costs of an observed graph.

    Args:
        gm: in stage OBSERVED.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        found: dict[tuple[str, ...], list[Edge]] = {}
        operands = list(_operands(gm))
        pinned = {e.source for e in operands if _pinned(e) and e.arg is not Arg.WEIGHT}
        # An observer that an addition or a norm reads as well stays at the width of the rules.
        pinned |= {e.source for e in annotated_edges(gm) if not e.kind.is_product}
        fixed: dict[tuple[str, ...], list[Edge]] = {}
        for edge in operands:
            if edge.source in pinned or _pinned(edge):
                fixed.setdefault((str(edge.source.target),), []).append(edge)
            else:
                found.setdefault(_key(edge), []).append(edge)
        self.groups = tuple(EdgeGroup(tuple(group)) for group in found.values())
        self._fixed = [EdgeGroup(tuple(group)) for group in fixed.values()]

    @cached_property
    def _images(self) -> int:
        """Number of images in the shapes that the graph carries."""
        (image,) = (node for node in self._gm.graph.nodes if node.op == "placeholder")
        return int(example_size(image.meta["val"].shape[0]))

    def _count(self, node: fx.Node) -> int:
        """Values of a node for one image; of one that the images do not reach, all."""
        shape = node.meta["val"].shape
        sizes = [int(example_size(size)) for size in shape]
        total = math.prod(sizes)
        return total if all(isinstance(size, int) for size in shape) else total // self._images

    def values(self, group: EdgeGroup) -> int:
        """Values of a group, of activations for one image."""
        if group.is_weight:
            return sum(get_parameter(self._gm, node).numel() for node in group.sources)
        return sum(self._count(node) for node in group.sources)

    @property
    def fixed(self) -> tuple[Fixed, ...]:
        """What keeps its width."""
        return tuple(
            Fixed(
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
        sides: dict[fx.Node, list[str | int]] = {}
        for edge in _operands(self._gm):
            sides.setdefault(edge.node, []).append(names.get(edge.name, _bits(edge)))
        return tuple(
            Product(macs=self.macs(node), left=both[0], right=both[1])
            for node, both in sides.items()
            if len(both) == 2
        )

    def macs(self, node: fx.Node) -> int:
        """Multiplications of a product for one image."""
        right = operand(node, 1).meta.get("val")
        if not isinstance(right, Tensor):
            right = get_parameter(self._gm, operand(node, 1))
        index = next(edge.arg for edge in edges(self._gm) if edge.node is node)
        if index is Arg.LHS:  # (…, n, K) @ (…, K, N)
            return self._count(node) * int(operand(node, 0).meta["val"].shape[-1])
        return self._count(node) * math.prod(int(size) for size in right.shape[1:])

    def work(self, widths: int) -> int:
        """Multiplications for one image of running what lies behind each group at each width."""
        order = {node: i for i, node in enumerate(self._gm.graph.nodes)}
        macs = {order[n]: self.macs(n) for n in self._gm.graph.nodes if op_kind(n) is not None}
        starts = [min(order[edge.node] for edge in group.edges) for group in self.groups]
        return widths * sum(
            sum(count for place, count in macs.items() if place >= start) for start in starts
        )


def _operands(gm: fx.GraphModule) -> Iterator[Edge]:
    """Annotated operands of products; what stands between products keeps the width of its rule."""
    return (edge for edge in annotated_edges(gm) if edge.kind.is_product)


def _pinned(edge: Edge) -> bool:
    return edge.arg in edge.node.meta.get("pinned", ())


def _bits(edge: Edge) -> int:
    assert edge.spec is not None
    return edge.spec.bits


def _key(edge: Edge) -> tuple[str, ...]:
    if edge.arg is Arg.WEIGHT and "packed" in edge.node.meta:
        return "packed", str(edge.node.meta["packed"])
    return (str(edge.source.target),)
