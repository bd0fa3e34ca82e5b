"""Sets the bit-widths of edges that a search of bit-widths chose.

Before: stage OBSERVED, edges and their observers at the widths of the policy's rules
After:  the same graph; the annotations and observers of the named edges have the chosen widths.
        Freeze then fits quantizers of these widths to the statistics that the observers hold
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from fxquant.config.vocabulary import Arg, Stage
from fxquant.errors import PassError
from fxquant.graph.edges import Edge, edges
from fxquant.graph.nodes import submodule
from fxquant.observers.observer import Observer
from fxquant.passes.base import PassResult, skipped


@dataclass(frozen=True)
class AllocateBits:
    """Sets the widths of the named edges and of their observers.

    Attributes:
        widths: edge name -> bits; other edges keep their width.
    """

    widths: Mapping[str, int]
    requires: ClassVar[Stage] = Stage.OBSERVED
    ensures: ClassVar[Stage] = Stage.OBSERVED

    def run(self, gm: fx.GraphModule) -> PassResult:
        """Replaces the annotations of the named edges by ones of the chosen widths.

        Raises:
            PassError: the graph has no edge of a name, or edges that share an observer get
                different widths.
            BitWidthError: the scheme of an edge does not exist at its width.
        """
        edges_by_name = {edge.name: edge for edge in edges(gm)}
        missing = sorted(set(self.widths) - set(edges_by_name))
        if missing:
            raise PassError(
                f"AllocateBits: the graph has no edges {', '.join(missing)}", edge=missing[0]
            )
        notes = [
            skipped(name, "gets no width: the edge is float")
            for name in self.widths
            if edges_by_name[name].spec is None
        ]
        self._check_shared(edges_by_name)
        changed = sum(
            self._set(gm, edges_by_name[name], bits) for name, bits in self.widths.items()
        )
        return PassResult(changed, tuple(notes))

    def _check_shared(self, edges_by_name: dict[str, Edge]) -> None:
        bits_of_observer: dict[fx.Node, int] = {}
        for name, edge in edges_by_name.items():
            if edge.spec is None or edge.arg is Arg.WEIGHT:
                continue
            bits = self.widths.get(name, edge.spec.bits)
            if bits_of_observer.setdefault(edge.source, bits) != bits:
                raise PassError(
                    f"AllocateBits: {name} shares its observer with an edge of "
                    f"{bits_of_observer[edge.source]} bits, got {bits}: give both the same width",
                    edge=name,
                    got=bits,
                    expected=bits_of_observer[edge.source],
                )

    def _set(self, gm: fx.GraphModule, edge: Edge, bits: int) -> bool:
        if edge.spec is None or edge.spec.bits == bits:
            return False
        spec = replace(edge.spec, bits=bits)
        edge.annotate(spec)
        observer = submodule(gm, edge.source)
        if isinstance(observer, Observer):
            observer.spec = spec
        return True
