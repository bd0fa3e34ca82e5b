"""Puts observers on annotated activation edges.

Before: ``linear(x, W)`` with ``quant = {input: spec, weight: …}``, stage ANNOTATED
After:  ``linear(quant.<edge>(x), W)``, stage OBSERVED

Edges that read one value with one spec and axis share an observer, because a run-time has one copy
of the value. Weights need no data: Freeze fits their quantizers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from fxquant.config.spec import TensorSpec
from fxquant.config.vocabulary import Arg, Stage
from fxquant.graph.edges import quantized_edges
from fxquant.graph.rewrite import insert_on_edge
from fxquant.observers.observer import make_observer
from fxquant.passes.base import PassResult


@dataclass(frozen=True)
class InsertObservers:
    """Inserts observers before the quantized activations of all operations.

    Attributes:
        histograms: keep a histogram of every edge, to which a quantizer of any width can be
            fitted.
    """

    histograms: bool = False
    requires: ClassVar[Stage] = Stage.ANNOTATED
    ensures: ClassVar[Stage] = Stage.OBSERVED

    def run(self, gm: fx.GraphModule) -> PassResult:
        """Inserts one observer for each (value, spec, axis)."""
        gm.add_module("quant", nn.Module())
        shared: dict[tuple[fx.Node, TensorSpec, int | None], fx.Node] = {}
        for edge in quantized_edges(gm):
            spec = edge.spec
            if spec is None or edge.arg is Arg.WEIGHT:
                continue
            key = (edge.source, spec, edge.scale_axis)
            if key not in shared:
                observer = make_observer(
                    spec, axis=edge.scale_axis, where=edge.name, histogram=self.histograms
                )
                shared[key] = insert_on_edge(gm, edge, f"quant.{edge.name}", observer)
            else:
                edge.replace_source(shared[key])
        return PassResult(len(shared))
