"""The blocks of a graph: stretches between which one activation alone carries all the data.

A graph may be cut where a single activation is still to be read, and nothing else that depends on
the image. Between two such cuts lies a chain, or a branch around which the activation is carried
(a residual connection). An attention and the residual part behind it make a transformer block. So
blocks are found by structure, not by name; a graph without cuts is one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.graph.dialect import op_kind
from fxquant.graph.liveness import last_readers
from fxquant.graph.nodes import module_path
from fxquant.graph.sizes import is_size


@dataclass(frozen=True)
class Block:
    """A stretch of the graph.

    Attributes:
        name: the module path that its nodes share, made unique.
        nodes: all that depends on the image, in the order of the graph.
        inputs: the values it reads from before.
        outputs: those that are read behind it; of the last block the ``output`` node itself.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @property
    def products(self) -> tuple[fx.Node, ...]:
        """Its linears, convolutions and matmuls."""
        return tuple(node for node in self.nodes if op_kind(node) is not None)


def find_blocks(gm: fx.GraphModule) -> tuple[Block, ...]:
    """The blocks of a graph in order, each with a product; the placeholder belongs to none."""
    data = data_nodes(gm)
    # What holds no product goes with what comes behind it; at the end, with what comes before.
    whole = _joined(_stretches(data), lambda one, two: not one.has_product)
    if len(whole) > 1 and not whole[-1].has_product:
        whole[-2:] = [whole[-2].followed_by(whole[-1])]
    merged = _joined(whole, _make_transformer_block)
    names: dict[str, int] = {}
    return tuple(_block(stretch.nodes, data, names) for stretch in merged)


def whole_network(gm: fx.GraphModule) -> Block:
    """All blocks of a graph as one."""
    blocks = find_blocks(gm)
    nodes = tuple(node for block in blocks for node in block.nodes)
    return Block("network", nodes, blocks[0].inputs, blocks[-1].outputs)


def data_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes that depend on the image, sizes left out."""
    found: dict[fx.Node, None] = {}
    for node in gm.graph.nodes:
        if is_size(node):
            continue
        if node.op == "placeholder" or any(used in found for used in node.all_input_nodes):
            found[node] = None
    return list(found)


def waves(nodes: Iterable[fx.Node], wanted: set[fx.Node]) -> Iterator[list[fx.Node]]:
    """Those of ``wanted`` in groups, none of which reads what another of its group computes.

    Args:
        nodes: in the order of the graph.
        wanted: some of them.
    """
    depth: dict[fx.Node, int] = {}
    groups: dict[int, list[fx.Node]] = {}
    for node in nodes:
        before = max((depth.get(used, 0) for used in node.all_input_nodes), default=0)
        depth[node] = before + (node in wanted)
        if node in wanted:
            groups.setdefault(depth[node], []).append(node)
    yield from (groups[level] for level in sorted(groups))


@dataclass(frozen=True)
class _Stretch:
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
    found: list[_Stretch] = []
    for stretch in stretches:
        if found and together(found[-1], stretch):
            found[-1] = found[-1].followed_by(stretch)
        else:
            found.append(stretch)
    return found


def _make_transformer_block(one: _Stretch, two: _Stretch) -> bool:
    """Whether an attention and the residual part behind it make one block."""
    return one.softmax and two.residual and not two.softmax and not _closed(one)


def _closed(stretch: _Stretch) -> bool:
    """Whether a transformer block is whole: a product stands behind what its softmax feeds into.

    Its attention ends at the first addition behind the softmax; what follows is the residual part.
    """
    nodes = stretch.nodes
    softmax = next(i for i, node in enumerate(nodes) if _is_softmax(node))
    sums = (i for i in range(softmax, len(nodes)) if _is_add(nodes[i]))
    end = next(sums, len(nodes))
    return any(op_kind(node) is not None for node in nodes[end:])


def _stretches(data: list[fx.Node]) -> Iterator[_Stretch]:
    """The graph cut wherever it can be."""
    last = last_readers(data)
    place = {node: i for i, node in enumerate(data)}
    batch = _leading(data[0])
    live: dict[fx.Node, None] = {data[0]: None}
    start, begun_with = 1, data[0]
    for i, node in enumerate(data[1:], 1):
        live[node] = None
        live = {n: None for n in live if n in last and place[last[n]] > i}
        whole = node.op == "output"
        # Behind a quantizer the two runs of a graph would be compared on its grid.
        single = [*live] == [node] and _leading(node) == batch and node.op != "call_module"
        if whole or single:
            nodes = tuple(data[start : i + 1])
            # A quantizer that a branch and what goes around it share is no reader of its own.
            same = {begun_with, *(u for u in begun_with.users if u.op == "call_module")}
            others = [n for n in nodes if n not in same]
            readers = sum(not same.isdisjoint(n.all_input_nodes) for n in others)
            yield _Stretch(nodes, any(map(_is_softmax, nodes)), readers > 1)
            start, begun_with = i + 1, node


def _leading(node: fx.Node) -> Any:
    """The first size of a value as text, None of what is no tensor."""
    val = node.meta.get("val")
    return str(val.shape[0]) if isinstance(val, Tensor) and val.ndim else None


def _is_softmax(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.softmax.int


def _is_add(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.add.Tensor


def _block(nodes: tuple[fx.Node, ...], data: list[fx.Node], names: dict[str, int]) -> Block:
    own, known = set(nodes), set(data)
    read = {u: None for node in nodes for u in node.all_input_nodes if u in known and u not in own}
    outputs = [n for n in nodes if n.op == "output" or any(u not in own for u in _readers(n))]
    paths = [module_path(node).split(".") for node in nodes if op_kind(node) is not None]
    name = ".".join(_common(paths)) or (nodes[-1].name if not paths else ".".join(paths[0]))
    names[name] = names.get(name, 0) + 1
    unique = name if names[name] == 1 else f"{name}#{names[name]}"
    return Block(unique, nodes, tuple(read), tuple(outputs))


def _readers(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if not is_size(user)]


def _common(paths: list[list[str]]) -> list[str]:
    if not paths:
        return []
    same = [parts[0] for parts in zip(*paths, strict=False) if len(set(parts)) == 1]
    length = next(
        (i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), len(same)
    )
    return same[:length]
