"""Quantizers of any width for the edges of an observed graph, from its observers' statistics."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from fxquant.config.spec import ObserverKind, Scheme
from fxquant.graph.edges import Edge
from fxquant.graph.nodes import get_parameter, submodule
from fxquant.mixed_precision.sensitivity.groups import EdgeGroup
from fxquant.observers.observer import HistogramObserver, Observer, make_observer
from fxquant.observers.ranges import value_range
from fxquant.quantizers import FAMILIES, Quantizer


class TrialQuantizers:
    """Trial quantizers, each fitted once.

    Args:
        gm: in stage OBSERVED, its observers with histograms, having seen data.
        least_squares: fit by least squared error, in place of a search of scales, which would
            take too long at every width; otherwise fit by the observer of each edge's spec.
        allow_uniform: fit a uniform quantizer instead of a twin one where its squared error is
            less, as the search of region ratios does.

    Attributes:
        settings: ``(least_squares, allow_uniform)``.
    """

    def __init__(
        self, gm: fx.GraphModule, *, least_squares: bool, allow_uniform: bool = False
    ) -> None:
        self._gm, self._least_squares, self._allow_uniform = gm, least_squares, allow_uniform
        self.settings = least_squares, allow_uniform
        self._fitted: dict[tuple[str, int], Quantizer] = {}

    @torch.no_grad()
    def quantizer(self, edge: Edge, bits: int) -> Quantizer:
        """The quantizer of an edge at a width."""
        key = f"{edge.source.target} {edge.spec}", bits
        if key not in self._fitted:
            self._fitted[key] = self._fit(edge, bits)
        return self._fitted[key]

    @torch.no_grad()
    def weights(self, group: EdgeGroup, bits: int) -> dict[fx.Node, Tensor]:
        """The quantized weight of each product that reads a group of weights."""
        parameters = {node: get_parameter(self._gm, node) for node in group.sources}
        return {e.node: self.quantizer(e, bits)(parameters[e.source]) for e in group.edges}

    def _fit(self, edge: Edge, bits: int) -> Quantizer:
        assert edge.spec is not None
        spec = replace(edge.spec, bits=bits)
        if self._least_squares:
            spec = replace(spec, observer=ObserverKind.MSE, percentile=None)
        observer = submodule(self._gm, edge.source)
        ratio = self._allow_uniform and spec.scheme.limits.has_regions
        if ratio and isinstance(observer, HistogramObserver):
            uniform = replace(spec, scheme=Scheme.UNIFORM, max_shift=None)
            return observer.best([observer.fit(spec), observer.fit(uniform)])
        if isinstance(observer, Observer):
            return observer.fit(spec)
        weight, axis = get_parameter(self._gm, edge.source), edge.scale_axis
        if not self._least_squares:
            observer = make_observer(spec, axis=axis, where=edge.name)
            observer(weight)
            return observer.fit()
        low, high = value_range(weight.flatten(1) if axis == 0 else weight.reshape(1, -1), spec)
        if axis is None:
            low, high = low.reshape(()), high.reshape(())
        return FAMILIES[spec.scheme].fit(low, high, spec, axis)
