"""Number of multiplications of a graph for one image."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property

from torch import Tensor, fx

from fxquant.config.vocabulary import OpKind
from fxquant.graph.dialect import op_kind
from fxquant.graph.nodes import get_parameter, operand
from fxquant.graph.shapes import example_batch, example_shape


class MacCounter:
    """Counts values and multiplications of a graph for one image.

    Args:
        gm: the graph, with the shapes of an example batch.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm, self._batch = gm, example_batch(gm.graph)

    def values(self, node: fx.Node) -> int:
        """Number of values that a node yields for one image; all, where no size is the batch."""
        total = math.prod(example_shape(node))
        if all(isinstance(size, int) for size in node.meta["val"].shape):
            return total
        return total // self._batch

    def macs(self, node: fx.Node) -> int:
        """Number of multiplications of a product for one image."""
        if op_kind(node) is OpKind.MATMUL:  # (…, n, K) @ (…, K, N)
            return self.values(node) * int(operand(node, 0).meta["val"].shape[-1])
        weight = operand(node, 1).meta.get("val")
        if not isinstance(weight, Tensor):
            weight = get_parameter(self._gm, operand(node, 1))
        return self.values(node) * math.prod(int(size) for size in weight.shape[1:])

    @cached_property
    def total(self) -> int:
        """Number of multiplications of the whole graph for one image."""
        return self.macs_after([next(iter(self._gm.graph.nodes))])

    def macs_after(self, starts: Iterable[fx.Node]) -> int:
        """Number of multiplications of running the graph from each start to its end, summed."""
        order = {node: i for i, node in enumerate(self._gm.graph.nodes)}
        macs = {order[n]: self.macs(n) for n in self._gm.graph.nodes if op_kind(n) is not None}
        return sum(
            count for start in starts for place, count in macs.items() if place >= order[start]
        )
