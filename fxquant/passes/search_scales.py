"""Searches scales by the output error of the products (arXiv 2111.12293, section 4.3).

Before: stage FROZEN, quantizers as the observers fitted them
After:  the same graph, each quantizer with the scale that makes the outputs of its products differ
        least from the float ones, in the search's metric, on the sampled rows

In each round and at each product the scale of the right operand (weight, key or value) is searched
first, then that of the left operand; the other operand stays as it is quantized at that moment.
Operands come from the float model, in this way products do not wait for one another. A quantizer
that several products read is searched for all of them. A comparison, of a searched region ratio, is
the output error over that with the best quantizer of the hand-set rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxquant.config.scale_search import GRADIENT_METRICS, ScaleSearch
from fxquant.config.spec import TensorSpec
from fxquant.config.vocabulary import Arg, OpKind, Stage
from fxquant.graph.edges import Edge, quantized_edges
from fxquant.graph.nodes import submodule
from fxquant.passes.base import Comparison, Note, PassResult, Refusal, skipped
from fxquant.quantizers import Quantizer
from fxquant.search.product_loss import Consumer, ProductSample
from fxquant.search.scales import Searched
from fxquant.search.start import SearchSite, start_search
from fxquant.utils.progress import track

_LEFT_ARGS = (Arg.INPUT, Arg.LHS)
_MEASURE = "output error of the hand-set rule"


@dataclass(frozen=True)
class SearchScales:
    """Searches the scale of every quantizer of a product by the product's output error.

    Attributes:
        samples: rows of each product by node name (``calibration.observe``).
        search: grid, metric and rounds.
        progress: show progress on stderr.
    """

    samples: Mapping[str, ProductSample] = field(repr=False)
    search: ScaleSearch
    progress: bool = False
    requires: ClassVar[Stage] = Stage.FROZEN
    ensures: ClassVar[Stage] = Stage.FROZEN

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        """Searches the scales of all quantizers, round by round."""
        notes: list[Note] = []
        state = _SearchState(gm, self, notes)
        steps = [(turn, name) for turn in range(self.search.rounds) for name in state.searched]
        for turn, name in track(
            steps, label="search scales", total=len(steps), enabled=self.progress
        ):
            state.improve(name, turn)
        changed = 0
        for name, searched in state.searched.items():
            new, old = searched.quantizer(), gm.get_submodule(name)
            changed += not _equal(new, old)
            gm.set_submodule(name, new)
            if searched.spec is not None:
                state.respecify(name, searched.spec)
        return PassResult(changed, tuple(notes), state.comparisons())


class _SearchState:
    """The quantizers under search and the products that read them."""

    def __init__(self, gm: fx.GraphModule, options: SearchScales, notes: list[Note]) -> None:
        self._gm, self._options = gm, options
        # Right operands come first, as in the paper's alternation of weight and activation.
        order = {node: i for i, node in enumerate(gm.graph.nodes)}
        products = (edge for edge in quantized_edges(gm) if edge.kind.is_product)
        search_order = sorted(products, key=lambda e: (order[e.node], e.arg in _LEFT_ARGS))
        self._readers: dict[str, list[Edge]] = {}
        self._edge_of = {(edge.node, edge.arg in _LEFT_ARGS): edge for edge in search_order}
        for edge in search_order:
            self._readers.setdefault(str(edge.source.target), []).append(edge)
        self.searched: dict[str, Searched] = {}
        for name, readers in self._readers.items():
            searched = self._start(name, readers)
            if isinstance(searched, Refusal):
                notes.append(skipped(readers[0].name, searched.reason))
            else:
                self.searched[name] = searched
        if options.search.metric in GRADIENT_METRICS:
            reason = "compared by squared error: the gradient of the loss does not reach it"
            notes += [skipped(n, reason) for n, s in options.samples.items() if s.gradient is None]

    def _start(self, name: str, readers: list[Edge]) -> Searched | Refusal:
        """The state of a quantizer's search, or the reason why its scale is not searched."""
        names = [edge.node.name for edge in readers]
        samples = [self._options.samples[name] for name in names if name in self._options.samples]
        if len(samples) < len(readers):
            return Refusal("its scale was not searched: no rows of the product were sampled")
        edge = readers[0]
        quantizer, spec = self._gm.get_submodule(name), edge.spec
        assert isinstance(quantizer, Quantizer) and spec is not None
        site = SearchSite(
            spec=spec,
            samples=samples,
            left=edge.arg in _LEFT_ARGS,
            is_weight=edge.arg is Arg.WEIGHT,
            search=self._options.search,
        )
        return start_search(quantizer, site)

    def comparisons(self) -> tuple[Comparison, ...]:
        """Comparisons of the searched region ratios with the hand-set rule."""
        return tuple(
            Comparison(self._readers[name][0].name, comparison[0], _MEASURE, comparison[1])
            for name, searched in self.searched.items()
            if (comparison := searched.comparison) is not None
        )

    def respecify(self, name: str, spec: TensorSpec) -> None:
        """Annotates the edges of a quantizer whose scheme the search changed."""
        for edge in self._readers[name]:
            edge.annotate(spec)

    def improve(self, name: str, turn: int) -> None:
        consumers = [self._consumer(edge) for edge in self._readers[name]]
        self.searched[name].improve(consumers, self._options.search, turn)

    def _consumer(self, edge: Edge) -> Consumer:
        sample, left = self._options.samples[edge.node.name], edge.arg in _LEFT_ARGS
        # The weights' rows are views of their transpose; reading a contiguous copy is faster.
        sample = replace(sample, rhs=sample.rhs.contiguous())
        values = sample.rhs if left else sample.lhs
        return Consumer(
            sample, left, self._quantized(self._edge_of.get((edge.node, not left)), values)
        )

    def _quantized(self, edge: Edge | None, values: Tensor) -> Tensor:
        """Values of an operand, as its edge quantizes them at present."""
        quantizer = None if edge is None else submodule(self._gm, edge.source)
        if edge is None or not isinstance(quantizer, Quantizer):
            return values
        searched = self.searched.get(str(edge.source.target))
        if searched is not None:
            return searched.apply(values, left=edge.arg in _LEFT_ARGS)
        if edge.scale_axis is None or not (edge.arg is Arg.WEIGHT or edge.kind is OpKind.CONV):
            quantized: Tensor = quantizer(values)
            return quantized
        return values  # samples have no axis for scales per channel of an activation


def _equal(new: Quantizer, old: torch.nn.Module) -> bool:
    pairs = zip(new.buffers(), old.buffers(), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs)
    return same and isinstance(old, Quantizer) and new.config() == old.config()
