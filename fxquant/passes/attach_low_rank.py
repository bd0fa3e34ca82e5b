"""Adds a low-rank branch next to a linear, which restores part of its weight's rounding error.

Before: ``y = linear(q(x), q(W), b)``
After:  ``y = linear(q(x), q(W), b) + linear(q8(linear(q(x), q8(A))), q8(B))``

``B A`` is the matrix of rank r nearest to ``W - q(W)`` in the layer's output on the sampled rows
(:mod:`fxquant.search.low_rank`; LQER, arXiv 2402.02446; SVDQuant, arXiv 2411.05007), outputs
weighted by the gradient of the loss where the rows have one. The factors are symmetric per output
channel, the activation between them is asymmetric per tensor. Both linears of a branch are ordinary
nodes, which every backend supports, and read the input through the layer's own quantizer.

A branch is kept where it reduces the output error on the sampled rows, which includes the error of
the rounded input, by at least ``MIN_ERROR_REDUCTION``. Where the bias was corrected
(``CorrectBias``), the mean of the branch's outputs is subtracted from the bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxquant.config.low_rank import LowRank
from fxquant.config.spec import Granularity, TensorSpec
from fxquant.config.vocabulary import Arg, OpKind, Stage
from fxquant.graph.dialect import aten
from fxquant.graph.edges import Edge
from fxquant.graph.meta import BIAS_CORRECTED, LOW_RANK_DECIDED
from fxquant.graph.products import Product, weighted_products
from fxquant.graph.rewrite import add_constant, emit, insert_on_edge, set_bias
from fxquant.graph.shapes import example_batch, example_shape
from fxquant.observers.observer import make_observer
from fxquant.passes.base import Comparison, Note, PassResult, Refusal, skipped
from fxquant.quantizers import Quantizer
from fxquant.search.low_rank import Spectrum, share_ranks, spectrum
from fxquant.search.product_loss import ProductSample

# A branch is kept where it reduces the output error by at least this share.
MIN_ERROR_REDUCTION = 0.05
_NO_BRANCH = "no branch: "
_MEASURE = "output error without the branch"


@dataclass(frozen=True)
class AttachLowRank:
    """Adds a low-rank branch to every linear whose output error falls enough by it.

    Attributes:
        samples: rows of each product by node name (``calibration.observe``).
        options: ranks and widths.
    """

    samples: Mapping[str, ProductSample] = field(repr=False)
    options: LowRank
    requires: ClassVar[Stage] = Stage.FROZEN
    ensures: ClassVar[Stage] = Stage.FROZEN

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        """Adds a branch wherever it reduces the output error enough."""
        sites: list[_Site] = []
        notes: list[Note] = []
        for product in weighted_products(gm):
            name = product.node.name
            if not LOW_RANK_DECIDED.get(product.node):
                site = _site(product, self.samples.get(name))
                if isinstance(site, _Site):
                    sites.append(site)
                else:
                    notes.append(skipped(name, _NO_BRANCH + site.reason))
        comparisons = []
        for site, factors in self._factors(sites):
            name = site.node.name
            LOW_RANK_DECIDED.set(site.node, True)
            if not len(factors.values):
                notes.append(
                    skipped(name, f"{_NO_BRANCH}other layers gain more for the same bytes")
                )
                continue
            branch = _Branch(site, factors, self.options.bits)
            before, after = site.error(None), site.error(branch.outputs)
            if after < (1 - MIN_ERROR_REDUCTION) * before:
                branch.insert(gm)
                comparisons.append(Comparison(name, branch.cost(), _MEASURE, after / before))
            else:
                reason = f"the output error would fall from {before:.3g} to {after:.3g} only"
                notes.append(skipped(name, _NO_BRANCH + reason))
        return PassResult(len(comparisons), tuple(notes), tuple(comparisons))

    def _factors(self, sites: list[_Site]) -> Iterator[tuple[_Site, Spectrum]]:
        """Each site with the factors of its error, of rank 0 where the byte budget has no room."""
        if self.options.rank is not None:
            for site in sites:
                yield site, site.spectrum().truncated(_rank(site, self.options.rank))
            return
        assert self.options.share is not None
        # At a rank of half the channels the factors have as many numbers as the weight.
        spectra = {s.node.name: s.spectrum().truncated(min(s.weight.shape) // 2) for s in sites}
        by_loss = any(site.importance is not None for site in sites)
        bits = self.options.bits
        ranks = share_ranks(
            {s.node.name: spectra[s.node.name].values.square() * s.worth(by_loss) for s in sites},
            {s.node.name: sum(s.weight.shape) * bits // 8 + 4 for s in sites},
            {s.node.name: 4 * len(s.weight) + 4 for s in sites},
            self.options.share * sum(site.weight_bytes for site in sites),
        )
        for site in sites:
            yield site, spectra[site.node.name].truncated(ranks[site.node.name])


def _rank(site: _Site, rank: int | float) -> int:
    full_rank = min(site.weight.shape)
    return min(rank, full_rank) if isinstance(rank, int) else max(1, round(rank * full_rank))


@dataclass(frozen=True, eq=False)
class _Site:
    """A linear whose input and weight are quantized.

    Attributes:
        node: the linear.
        weight: ``(N, K)``.
        rounding_error: ``W - q(W)``.
        weight_bytes: size of the weight's codes.
        inputs: rows of the linear's input, ``(n, K)``.
        rows: the same rows, quantized.
        shares: share of all rows that each sampled row represents, ``(n,)``.
        importance: root mean square of the gradient of each output, ``(N,)``; None without
            gradients.
        centred: the mean error is corrected by the bias already.
    """

    node: fx.Node
    weight: Tensor
    rounding_error: Tensor
    weight_bytes: float
    inputs: Tensor
    rows: Tensor
    shares: Tensor
    importance: Tensor | None
    centred: bool

    def spectrum(self) -> Spectrum:
        """Decomposes the weight's rounding error by its effect on the output."""
        rows = self.rows - self.shares @ self.rows if self.centred else self.rows
        weights = self.importance
        if weights is not None:  # an output that the loss does not reach still counts a little
            weights = weights.clamp(min=1e-3 * float(weights.max()))
        rows = rows * (self.shares * len(rows)).sqrt().unsqueeze(1)
        return spectrum(self.rounding_error, rows, weights)

    def error(self, branch: Tensor | None) -> float:
        """Squared error of the output on the rows, weighted by the shares and the importance.

        Args:
            branch: output of a branch for the rows, ``(n, N)``; None without a branch.
        """
        rounding = -self.rows @ self.rounding_error.t()
        if branch is not None:
            rounding += branch
        if self.centred:
            rounding -= self.shares @ rounding
        error = (self.rows - self.inputs) @ self.weight.t() + rounding
        if self.importance is not None:
            error *= self.importance
        return float(self.shares @ error.square().sum(1))

    def worth(self, by_loss: bool) -> float:
        """Weight of an output error of one per row, compared with other layers.

        With gradients it is the rise of the loss of an image, without gradients one over the mean
        squared output.
        """
        if not by_loss:
            return 1 / max(
                float(self.shares @ (self.inputs @ self.weight.t()).square().sum(1)), 1e-30
            )
        if self.importance is None:
            return 0.0
        rows = math.prod(example_shape(self.node)[:-1])
        return rows / example_batch(self.node.graph)


def _site(product: Product, sample: ProductSample | None) -> _Site | Refusal:
    """A site, or the reason why a product gets no branch."""
    if product.kind is OpKind.CONV:
        return Refusal("it is a convolution")
    x, weight_quantizer = product.input_quantizer, product.weight_quantizer
    if weight_quantizer is None:
        return Refusal("the weight is float")
    if x is None:
        return Refusal("the input is float, so that the product is float")
    if x.scale_axis is not None:
        return Refusal("the input has a scale per channel")
    if sample is None:
        return Refusal("no rows of the product were sampled")
    weight = product.weight
    inputs = sample.lhs[0, 0]
    counts = inputs.new_ones(len(inputs)) if sample.counts is None else sample.counts
    gradient = sample.gradient
    return _Site(
        node=product.node,
        weight=weight,
        rounding_error=weight - weight_quantizer(weight),
        weight_bytes=weight.numel() * weight_quantizer.bits / 8,
        inputs=inputs,
        rows=x(inputs),
        shares=counts / counts.sum(),
        # The gradient is scaled by the root of the counts.
        importance=None
        if gradient is None
        else (gradient[0, 0].square().sum(0) / counts.sum()).sqrt(),
        centred=bool(BIAS_CORRECTED.get(product.node)),
    )


class _Branch:
    """The quantized factors of a site, and the quantizer between them."""

    def __init__(self, site: _Site, factors: Spectrum, bits: int) -> None:
        self._site, self._factors = site, factors
        self._weight = TensorSpec(bits=bits, symmetric=True, granularity=Granularity.CHANNEL)
        self._between = TensorSpec(bits=bits)
        name = site.node.name
        self._down = _fitted(self._weight, factors.down, 0, f"{name}_down__weight")
        self._up = _fitted(self._weight, factors.up, 0, f"{name}_up__weight")
        inner = site.rows @ self._down(factors.down).t()
        self._inner = _fitted(self._between, inner, None, f"{name}_up__input")
        self.outputs: Tensor = self._inner(inner) @ self._up(factors.up).t()

    def cost(self) -> str:
        """Rank, and the additional multiplications and bytes compared with the layer."""
        (n, k), rank = self._site.weight.shape, len(self._factors.values)
        stored = rank * (n + k) * self._weight.bits // 8 + 4 * (n + rank + 1)
        macs = rank * (n + k) / (n * k)
        return f"branch of rank {rank}, {macs:+.1%} multiplications, {stored:+,} bytes"

    def insert(self, gm: fx.GraphModule) -> None:
        """Adds the branch to the graph."""
        node = self._site.node
        x = Edge(node, Arg.INPUT)
        with gm.graph.inserting_before(node):
            down = self._linear(gm, x.source, self._factors.down, "down")
            up = self._linear(gm, down, self._factors.up, "up")
        with gm.graph.inserting_after(node):
            total = emit(gm, aten.add.Tensor, node, up, like=node)
        total._rename(f"{node.name}_sum")
        node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
        assert x.spec is not None
        Edge(down, Arg.INPUT).annotate(x.spec)
        for edge, spec, quantizer in (
            (Edge(down, Arg.WEIGHT), self._weight, self._down),
            (Edge(up, Arg.INPUT), self._between, self._inner),
            (Edge(up, Arg.WEIGHT), self._weight, self._up),
        ):
            insert_on_edge(gm, edge, f"quant.{edge.name}", quantizer)
            edge.annotate(spec)
        if self._site.centred:
            mean = self._site.shares @ self.outputs
            bias = Product(gm, node).bias
            assert bias is not None  # CorrectBias gave the linear one
            set_bias(gm, node, bias - mean)

    def _linear(self, gm: fx.GraphModule, x: fx.Node, factor: Tensor, side: str) -> fx.Node:
        node = self._site.node
        stored = add_constant(gm, factor, f"{node.name}_{side}_factor", like=node)
        linear = emit(gm, aten.linear.default, x, stored, like=node)
        linear._rename(f"{node.name}_{side}")
        LOW_RANK_DECIDED.set(linear, True)
        return linear


def _fitted(spec: TensorSpec, values: Tensor, axis: int | None, where: str) -> Quantizer:
    observer = make_observer(spec, axis=axis, where=where)
    observer(values)
    return observer.fit()
