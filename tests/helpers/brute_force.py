"""The search of scales as the paper has it, by brute force: the oracle for SearchScales.

One candidate at a time, plain quantizers, a full product each (arXiv 2111.12293, section 4.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, fx

from fxquant.config.scale_search import GRADIENT_METRICS, Metric, ScaleSearch
from fxquant.config.vocabulary import Arg, OpKind
from fxquant.graph.dialect import op_kind
from fxquant.graph.edges import Edge, quantized_edges
from fxquant.graph.nodes import get_parameter, operand
from fxquant.quantizers import Quantizer, TwinUniformQuantizer, UniformQuantizer
from fxquant.search.product_loss import ProductSample

Quantizers = dict[str, Quantizer]
LEFT = (Arg.INPUT, Arg.LHS)


def quantizers(gm: fx.GraphModule) -> Quantizers:
    """The quantizers of a frozen graph by name."""
    return {name: m for name, m in gm.named_modules() if isinstance(m, Quantizer)}


class BruteForce:
    """Products of a frozen graph and what quantizes their operands.

    Args:
        gm: in stage FROZEN, not changed.
        samples: rows of each product by node name.
        metric: what is compared.
    """

    def __init__(
        self, gm: fx.GraphModule, samples: Mapping[str, ProductSample], metric: Metric
    ) -> None:
        self.gm, self.samples, self.metric = gm, samples, metric
        self.chosen = quantizers(gm)
        self.nodes = [node for node in gm.graph.nodes if op_kind(node) is not None]
        edges = list(quantized_edges(gm))
        self.names = {(e.node, e.arg in LEFT): str(e.source.target) for e in edges}
        self.edges = {(e.node, e.arg in LEFT): e for e in edges}

    def quantized(self, node: fx.Node, left: bool) -> Tensor:
        """An operand as it is quantized now."""
        sample = self.samples[node.name]
        quantizer = self.chosen[self.names[node, left]]
        if left:
            return quantizer(sample.lhs)
        if op_kind(node) is OpKind.MATMUL:
            return quantizer(sample.rhs)
        weight = quantizer(get_parameter(self.gm, operand(operand(node, 1), 0))).flatten(1)
        return weight.unflatten(0, (sample.heads, -1)).mT.unsqueeze(0)

    def errors(self, node: fx.Node, *, columns: bool = False) -> Tensor:
        """What is summed to the loss, ``(S, H, n, N)``.

        Of the cosine ``(S, H, n, 1)``, or where a column has a scale of its own ``(1, H, 1, N)``.
        """
        sample = self.samples[node.name]
        y = self.quantized(node, True) @ self.quantized(node, False)
        target = sample.lhs @ sample.rhs
        if self.metric is Metric.COSINE:
            y, target = y.double(), target.double()
        if self.metric is Metric.COSINE and columns:
            y, target = (t.movedim(2, 1).flatten(0, 1) for t in (y, target))
            return 1 - torch.cosine_similarity(y, target, 0)[None, :, None]
        if self.metric is Metric.COSINE:
            return 1 - torch.cosine_similarity(y, target, -1).unsqueeze(-1)
        if self.metric is Metric.L1:
            return (y - target).abs()
        weight = sample.gradient if self.metric in GRADIENT_METRICS else None
        if weight is None:
            return (y - target).square()
        weight = weight.square()
        if self.metric is Metric.FISHER and op_kind(node) is not OpKind.MATMUL:
            weight = weight.mean((0, 2), keepdim=True)
        return (y - target).square() * weight

    def loss(self, node: fx.Node) -> float:
        """The loss of one product."""
        return float(self.errors(node).double().sum())

    def losses(self) -> dict[str, float]:
        """The loss of every product by name."""
        return {node.name: self.loss(node) for node in self.nodes}

    def search(self, search: ScaleSearch) -> None:
        """All rounds over all quantizers."""
        walks = {name: walk_of(q, search, self, name) for name, q in self.chosen.items()}
        for turn in range(search.rounds):
            done = set()
            for node in self.nodes:
                for left in (False, True):
                    name = self.names[node, left]
                    if name not in done:
                        done.add(name)
                        walks[name](turn)

    def readers(self, name: str) -> list[tuple[fx.Node, bool]]:
        """The operands that a quantizer stands on: node, and whether it is the left one."""
        return [operand for operand, other in self.names.items() if other == name]

    def unit_losses(self, name: str, quantizer: Quantizer) -> Tensor:
        """Losses with another quantizer, one for each of its scales."""
        before, self.chosen[name] = self.chosen[name], quantizer
        total = torch.zeros(())
        for node, _ in self.readers(name):
            axis = getattr(quantizer, "axis", None)
            errors = self.errors(node, columns=axis == 0)
            if axis is None:
                total = total + errors.sum()
            elif axis == 0:
                total = total + errors.sum((0, 2)).flatten()
            else:
                total = total + errors.sum((0, 2, 3))
        self.chosen[name] = before
        return total


def walk_of(
    fitted: Quantizer, search: ScaleSearch, work: BruteForce, name: str
) -> Callable[[int], None]:
    """What moves a quantizer to its best candidate in a round."""
    edge = work.edges[work.readers(name)[0]]
    if isinstance(fitted, TwinUniformQuantizer):
        candidates = list(twins(fitted, search, work, edge))

        def walk_twin(_: int) -> None:
            tried = [work.chosen[name], *candidates]
            found = [float(work.unit_losses(name, q)) for q in tried]
            work.chosen[name] = tried[found.index(min(found))]

        return walk_twin
    assert isinstance(fitted, UniformQuantizer)
    lo = (fitted.qmin - fitted.zero_point) * fitted.scale
    hi = (fitted.qmax - fitted.zero_point) * fitted.scale
    ends = [torch.ones_like(lo), torch.ones_like(hi)]
    grid = torch.linspace(search.low, search.high, search.candidates)
    grid[(grid - 1).abs().argmin()] = 1

    def make(low: Tensor, high: Tensor) -> UniformQuantizer:
        steps = fitted.qmax - fitted.qmin
        scale = (hi * high - lo * low) / steps
        zero = fitted.zero_point if fitted.signed else (-lo * low / scale).round()
        zero = zero.clamp(fitted.qmin, fitted.qmax)
        return UniformQuantizer(
            scale, zero, bits=fitted.bits, signed=fitted.signed, axis=fitted.axis
        )

    def walk(turn: int) -> None:
        moved = (0, 1) if fitted.signed or turn == 0 else (turn % 2,)
        best, least = [end.clone() for end in ends], work.unit_losses(name, make(*ends))
        for share in grid:
            tried = [torch.full_like(e, share) if i in moved else e for i, e in enumerate(ends)]
            found = work.unit_losses(name, make(*tried))
            best = [torch.where(found < least, t, b) for t, b in zip(tried, best, strict=True)]
            least = torch.minimum(found, least)
        ends[:] = best
        work.chosen[name] = make(*ends)

    return walk


def twins(
    fitted: TwinUniformQuantizer, search: ScaleSearch, work: BruteForce, edge: Edge
) -> Iterator[TwinUniformQuantizer]:
    """Coarse steps on the grid with the fine one covering; or every shift of two coarse steps."""
    sample = work.samples[edge.node.name]
    values = sample.lhs if edge.arg in LEFT else sample.rhs
    low, high, levels = -float(values.min()), float(values.max()), fitted.levels
    if fitted.two_sided:
        full = max(high / (levels - 1), low / levels)
        grid = torch.linspace(search.low, search.high, search.candidates)
        for i, share in enumerate(grid.tolist()):
            if i == int((grid - 1).abs().argmin()):
                continue  # what the observers found stands in its place
            coarse = full * share
            shift = max(0, math.floor(math.log2(coarse * levels / low)))
            yield twin(coarse, shift, fitted)
    else:
        for coarse in (high / (levels - 1), 1 / levels):
            for shift in range(1, 12):
                yield twin(coarse, shift, fitted)


def twin(coarse: float, shift: int, like: TwinUniformQuantizer) -> TwinUniformQuantizer:
    """A twin quantizer of the same width."""
    scale = torch.tensor(coarse / 2**shift)
    return TwinUniformQuantizer(scale, shift=shift, bits=like.bits, two_sided=like.two_sided)
