"""Replaces observers by quantizers, and fits the quantizers of the weights.

Before: ``linear(observer(x), W)``, stage OBSERVED, data seen
After:  ``linear(quantizer(x), quantizer(W))``, stage FROZEN
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.config.spec import TensorSpec
from fxquant.config.vocabulary import Arg, Stage
from fxquant.graph.edges import quantized_edges
from fxquant.graph.nodes import get_parameter, submodule
from fxquant.graph.rewrite import insert_on_edge
from fxquant.observers.observer import Observer, make_observer
from fxquant.passes.base import PassResult


@dataclass(frozen=True)
class Freeze:
    """Fits quantizers to the observed ranges of activations and to the weights."""

    requires: ClassVar[Stage] = Stage.OBSERVED
    ensures: ClassVar[Stage] = Stage.FROZEN

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        """Fits every quantizer.

        Raises:
            CalibrationError: an edge saw no data.
        """
        fitted = 0
        for node in gm.graph.nodes:
            observer = submodule(gm, node)
            if isinstance(observer, Observer):
                gm.set_submodule(str(node.target), observer.fit())
                fitted += 1
        shared: dict[tuple[fx.Node, TensorSpec], fx.Node] = {}
        for edge in quantized_edges(gm):
            spec = edge.spec
            if spec is None or edge.arg is not Arg.WEIGHT:
                continue
            key = (edge.source, spec)
            if key not in shared:
                observer = make_observer(spec, axis=edge.scale_axis, where=edge.name)
                observer(get_parameter(gm, edge.source))
                shared[key] = insert_on_edge(gm, edge, f"quant.{edge.name}", observer.fit())
            else:
                edge.replace_source(shared[key])
        return PassResult(fitted + len(shared))
