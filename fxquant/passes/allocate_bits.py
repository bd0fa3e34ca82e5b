"""Gives edges the widths that a search of bit-widths chose.

Before: stage OBSERVED, edges and their observers at the widths of the policy's rules
After:  the same graph; annotations and observers of the edges named at the widths given, which
        Freeze then fits from the statistics that the observers have already
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
    """See the module's text.

    Attributes:
        widths: edge name -> bits; other edges keep theirs.
    """

    widths: Mapping[str, int]
    requires: ClassVar[Stage] = Stage.OBSERVED
    ensures: ClassVar[Stage] = Stage.OBSERVED

    def run(self, gm: fx.GraphModule) -> PassResult:
        """Annotates anew.

        Raises:
            PassError: there is no edge of a name, or edges that share an observer get other
                widths.
            BitWidthError: a width does not go with the scheme of its edge.
        """
        found = {edge.name: edge for edge in edges(gm)}
        missing = sorted(set(self.widths) - set(found))
        if missing:
            raise PassError(f"AllocateBits: the graph has no edges {', '.join(missing)}")
        notes = [
            skipped(name, "gets no width: the edge is float")
            for name in self.widths
            if found[name].spec is None
        ]
        self._check_shared(found)
        changed = sum(self._set(gm, found[name], bits) for name, bits in self.widths.items())
        return PassResult(changed, tuple(notes))

    def _check_shared(self, found: dict[str, Edge]) -> None:
        chosen: dict[fx.Node, int] = {}
        for name, edge in found.items():
            if edge.spec is None or edge.arg is Arg.WEIGHT:
                continue
            bits = self.widths.get(name, edge.spec.bits)
            if chosen.setdefault(edge.source, bits) != bits:
                raise PassError(
                    f"AllocateBits: {name} shares its observer with an edge of "
                    f"{chosen[edge.source]} bits, got {bits}: give both the same width"
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
