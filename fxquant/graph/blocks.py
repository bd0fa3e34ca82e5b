"""The blocks of a graph: stretches between which a single activation carries all the data.

A graph can be cut where later nodes read a single activation and nothing else that depends on the
image. Between two such cuts lies a chain, or a branch with a residual connection around it. An
attention and the residual branch behind it make one transformer block. Blocks are found in this way
by structure, not by name; a graph without cuts is one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor, fx

from fxquant.graph.dialect import op_kind
from fxquant.graph.liveness import last_readers
from fxquant.graph.nodes import module_path
from fxquant.graph.sizes import is_size
from fxquant.graph.softmax import is_softmax


@dataclass(frozen=True)
class Block:
    """A stretch of the graph.

    Attributes:
        name: module path that the block's products share, made unique.
        nodes: nodes that depend on the image, in the order of the graph.
        inputs: nodes in front of the block whose values the block reads.
        outputs: nodes of the block whose values later blocks read; for the last block the
            ``output`` node itself.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @property
    def products(self) -> tuple[fx.Node, ...]:
        """Linears, convolutions and matmuls of the block."""
        return tuple(node for node in self.nodes if op_kind(node) is not None)


def find_blocks(gm: fx.GraphModule) -> tuple[Block, ...]:
    """The blocks of a graph in order, each with a product; the placeholder belongs to none."""
    data = data_nodes(gm)
    # A stretch without a product joins the next one; the last stretch joins the one before.
    stretches = _joined(_stretches(data), lambda one, two: not one.has_product)
    if len(stretches) > 1 and not stretches[-1].has_product:
        stretches[-2:] = [stretches[-2].followed_by(stretches[-1])]
    merged = _joined(stretches, _make_transformer_block)
    names: dict[str, int] = {}
    return tuple(_block(stretch.nodes, data, names) for stretch in merged)


def whole_network(gm: fx.GraphModule) -> Block:
    """The blocks of a graph, merged into a single block."""
    blocks = find_blocks(gm)
    nodes = tuple(node for block in blocks for node in block.nodes)
    return Block("network", nodes, blocks[0].inputs, blocks[-1].outputs)


def data_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes that depend on the image, without sizes, in the order of the graph."""
    data: dict[fx.Node, None] = {}
    for node in gm.graph.nodes:
        if is_size(node):
            continue
        if node.op == "placeholder" or any(source in data for source in node.all_input_nodes):
            data[node] = None
    return list(data)


def waves(nodes: Iterable[fx.Node], selected: set[fx.Node]) -> Iterator[list[fx.Node]]:
    """Groups of selected nodes, in order; no node reads what another one of its group computes.

    Args:
        nodes: in the order of the graph.
        selected: the nodes to group.
    """
    depth: dict[fx.Node, int] = {}
    groups: dict[int, list[fx.Node]] = {}
    for node in nodes:
        before = max((depth.get(source, 0) for source in node.all_input_nodes), default=0)
        depth[node] = before + (node in selected)
        if node in selected:
            groups.setdefault(depth[node], []).append(node)
    yield from (groups[level] for level in sorted(groups))


@dataclass(frozen=True)
class _Stretch:
    """Nodes between two cuts.

    Attributes:
        nodes: in the order of the graph.
        softmax: whether one of the nodes is a softmax.
        residual: whether a residual connection leads around a branch.
    """

    nodes: tuple[fx.Node, ...]
    softmax: bool
    residual: bool

    def followed_by(self, other: _Stretch) -> _Stretch:
        both = (*self.nodes, *other.nodes)
        return _Stretch(both, self.softmax or other.softmax, self.residual or other.residual)

    @property
    def has_product(self) -> bool:
        return any(op_kind(node) is not None for node in self.nodes)


def _joined(
    stretches: Iterable[_Stretch], together: Callable[[_Stretch, _Stretch], bool]
) -> list[_Stretch]:
    """Merges neighbouring stretches for which ``together`` is true."""
    joined: list[_Stretch] = []
    for stretch in stretches:
        if joined and together(joined[-1], stretch):
            joined[-1] = joined[-1].followed_by(stretch)
        else:
            joined.append(stretch)
    return joined


def _make_transformer_block(one: _Stretch, two: _Stretch) -> bool:
    """Whether an attention and the residual branch behind it make one block."""
    return one.softmax and two.residual and not two.softmax and not _is_complete(one)


def _is_complete(stretch: _Stretch) -> bool:
    """Whether a stretch holds a product behind its attention, and is a transformer block already.

    The attention ends at the first addition behind the softmax.
    """
    nodes = stretch.nodes
    softmax = next(i for i, node in enumerate(nodes) if is_softmax(node))
    sums = (i for i in range(softmax, len(nodes)) if nodes[i].target is torch.ops.aten.add.Tensor)
    end = next(sums, len(nodes))
    return any(op_kind(node) is not None for node in nodes[end:])


def _stretches(data: list[fx.Node]) -> Iterator[_Stretch]:
    """The graph cut at every place where it can be cut."""
    last = last_readers(data)
    place = {node: i for i, node in enumerate(data)}
    batch = _leading_size(data[0])
    live: dict[fx.Node, None] = {data[0]: None}
    start, entry = 1, data[0]
    for i, node in enumerate(data[1:], 1):
        live[node] = None
        live = {n: None for n in live if n in last and place[last[n]] > i}
        # No cut behind a quantizer: there float and quantized values would be compared on its grid.
        single = [*live] == [node] and _leading_size(node) == batch and node.op != "call_module"
        if single or node.op == "output":
            nodes = tuple(data[start : i + 1])
            # A branch and its residual connection may share a quantizer, which counts as the entry.
            entries = {entry, *(user for user in entry.users if user.op == "call_module")}
            readers = sum(
                not entries.isdisjoint(n.all_input_nodes) for n in nodes if n not in entries
            )
            yield _Stretch(nodes, any(map(is_softmax, nodes)), readers > 1)
            start, entry = i + 1, node


def _leading_size(node: fx.Node) -> str | None:
    """First size of a value as text, None for a value that is not a tensor."""
    val = node.meta.get("val")
    return str(val.shape[0]) if isinstance(val, Tensor) and val.ndim else None


def _block(nodes: tuple[fx.Node, ...], data: list[fx.Node], names: dict[str, int]) -> Block:
    inside, outside = set(nodes), set(data).difference(nodes)
    inputs = {n: None for node in nodes for n in node.all_input_nodes if n in outside}
    outputs = [n for n in nodes if n.op == "output" or any(u not in inside for u in _readers(n))]
    paths = [module_path(node).split(".") for node in nodes if op_kind(node) is not None]
    name = ".".join(_common_prefix(paths)) or (nodes[-1].name if not paths else ".".join(paths[0]))
    names[name] = names.get(name, 0) + 1
    unique = name if names[name] == 1 else f"{name}#{names[name]}"
    return Block(unique, nodes, tuple(inputs), tuple(outputs))


def _readers(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if not is_size(user)]


def _common_prefix(paths: list[list[str]]) -> list[str]:
    levels = zip(*paths, strict=False)
    return [names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels)]
