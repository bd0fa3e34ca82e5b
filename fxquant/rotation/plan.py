"""Choice of the streams to rotate, by what undoing the rotation at exits and entries costs."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import fx

from fxquant.graph.dialect import aten
from fxquant.graph.macs import MacCounter
from fxquant.rotation.flow import Carrier, Flow

_NO_STREAM = "no product reads the channels of a residual stream behind a norm: nothing is rotated"


@dataclass(frozen=True)
class Stream:
    """A stream that is rotated.

    Attributes:
        number: its number in the flow.
        width: number of channels.
        keeps_mean: whether a layer norm reads it, which needs a mean-preserving rotation.
    """

    number: int
    width: int
    keeps_mean: bool


@dataclass(frozen=True)
class RotationPlan:
    """The streams to rotate, and the others.

    Attributes:
        rotated: streams in graph order.
        refused: name of the first value of each other stream next to a norm -> the reason.
    """

    rotated: tuple[Stream, ...]
    refused: dict[str, str]


@dataclass(frozen=True)
class _AddedLinear:
    """A linear that rotates a value, or undoes a rotation, at run time.

    Attributes:
        node: the value, which is a norm's output for a norm that is an entry.
        streams: the streams for each of which the linear is needed.
        macs: number of multiplications for one image.
    """

    node: fx.Node
    streams: tuple[int, ...]
    macs: int


def plan_rotation(gm: fx.GraphModule, flow: Flow, max_overhead: float) -> RotationPlan:
    """Chooses the streams to rotate; the costliest are left out until the others are cheap enough.

    Args:
        gm: the graph.
        flow: its streams.
        max_overhead: largest number of multiplications of all added linears, as a share of the
            network's.
    """
    counter = MacCounter(gm)
    linears = _added_linears(flow, counter)
    rotated, refused = _candidates(flow), dict[str, str]()
    if not rotated:
        refused["model"] = _NO_STREAM
    while sum(item.macs for item in _needed(linears, rotated)) > max_overhead * counter.total:
        costs = {number: sum(i.macs for i in _needed(linears, [number])) for number in rotated}
        costliest = max(rotated, key=costs.__getitem__)
        rotated.remove(costliest)
        names = list(dict.fromkeys(item.node.name for item in _needed(linears, [costliest])))
        others = f" and {len(names) - 3} more" if len(names) > 3 else ""
        refused[_name(flow, costliest)] = (
            f"the residual stream stays: linears behind {', '.join(names[:3])}{others} would have "
            f"to rotate at run time, with {costs[costliest] / counter.total:.1%} of the network's "
            f"multiplications; {max_overhead:.1%} are allowed for all streams"
        )
    widths = _widths(flow)
    streams = (Stream(n, widths[n], _keeps_mean(flow, n)) for n in rotated)
    return RotationPlan(tuple(streams), refused)


def _candidates(flow: Flow) -> list[int]:
    """The streams next to a norm whose values a product reads."""
    norms = {flow.stream(reader.carrier.stream) for reader in flow.norms.values()}
    norms |= {flow.stream(r.entry) for r in flow.norms.values() if r.entry is not None}
    read = {flow.stream(carrier.stream) for _, carrier in flow.consumers}
    return sorted(norms & read)


def _added_linears(flow: Flow, counter: MacCounter) -> list[_AddedLinear]:
    linears: dict[tuple[fx.Node, int], _AddedLinear] = {}

    def add(node: fx.Node, carrier: Carrier, *streams: int) -> None:
        macs = counter.values(node) * carrier.layout.size
        linears[node, streams[-1]] = _AddedLinear(node, streams, macs)

    for node, (carrier, _) in flow.exits.items():
        add(node, carrier, flow.stream(carrier.stream))
    for node, carrier, _ in flow.entries:
        add(node, carrier, flow.stream(carrier.stream))
    for reader in flow.norms.values():
        if reader.entry is not None:
            streams = flow.stream(reader.carrier.stream), flow.stream(reader.entry)
            add(reader.node, reader.carrier, *streams)
    return list(linears.values())


def _needed(linears: Collection[_AddedLinear], streams: Collection[int]) -> Iterator[_AddedLinear]:
    """The linears that rotating some streams adds."""
    return (item for item in linears if not set(streams).isdisjoint(item.streams))


def _widths(flow: Flow) -> dict[int, int]:
    """Number of channels by stream."""
    carriers = [carrier for _, carrier in flow.consumers]
    return {flow.stream(carrier.stream): carrier.layout.width for carrier in carriers}


def _keeps_mean(flow: Flow, number: int) -> bool:
    """Whether a layer norm reads a stream."""
    return any(
        reader.node.target is aten.layer_norm.default
        and flow.stream(reader.carrier.stream) == number
        for reader in flow.norms.values()
    )


def _name(flow: Flow, number: int) -> str:
    """Name of the first value of a stream."""
    values = {node for node, stream in flow.producers.items() if flow.stream(stream) == number}
    values |= {
        reader.node
        for reader in flow.norms.values()
        if reader.entry is not None and flow.stream(reader.entry) == number
    }
    return min(values).name  # nodes compare by their place in the graph
