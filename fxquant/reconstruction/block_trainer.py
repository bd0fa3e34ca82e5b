"""Trains one block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.graph import (
    Edge,
    get_parameter,
    op_kind,
    operand,
    quantized_edges,
    submodule,
)
from fxquant.quantizers import Quantizer, UniformQuantizer
from fxquant.reconstruction.activations import TrainedQuantizer, draw_mask, trained
from fxquant.reconstruction.curriculum import Curriculum
from fxquant.reconstruction.losses import Criterion
from fxquant.reconstruction.rank_search import RankSearch, candidate_ranks
from fxquant.reconstruction.weights import AdaRound, LowRank, StraightThrough, TrainedWeight
from fxquant.recovery import Reconstruction, WeightTraining
from fxquant.side_by_side import CHUNK, Station, Values, tensors_of
from fxquant.spec import Arg, OpKind

# The regularizer of roundings beside a loss that starts at one.
_PUSH = 1.0
# How often the loss is looked at, and a curriculum sorts the images anew.
_LOOKS = 8
# Largest norm of the gradient of a step, of a loss that starts at one.
_CLIP = 10.0


@dataclass(frozen=True)
class Changes:
    """What training made of a block.

    Attributes:
        quantizers: by name of the calling node.
        weights: before rounding, by name of the node that reads them.
        biases: by name of the product.
        ranks: of low-rank changes, by name of the node that reads the weight.
    """

    quantizers: Mapping[str, Quantizer]
    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    ranks: Mapping[str, int] = field(default_factory=dict)


class TrainedBlock(nn.Module):
    """The trained parts of a block.

    Args:
        gm: the quantized graph.
        station: the block.
        options: what is trained.
        generator: draws first values.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        station: Station,
        options: Reconstruction,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.quantizers, self.weights = nn.ModuleDict(), nn.ModuleDict()
        self.biases = nn.ParameterDict()
        self._station, self._bf16 = station, options.bf16
        own = station.block.nodes  # in order: sums over parameters then are the same in each run
        for edge in quantized_edges(gm):
            if edge.node in own:
                self._add_edge(gm, edge, options, generator)
        if options.biases:
            for node, bias in _biases(gm, own):
                self.biases[node.name] = nn.Parameter(bias.detach().clone())
        self._bias_nodes = {
            operand(node, 2).name: node.name for node in own if node.name in self.biases
        }

    def _add_edge(
        self,
        gm: fx.GraphModule,
        edge: Edge,
        options: Reconstruction,
        generator: torch.Generator,
    ) -> None:
        call, name = edge.source, edge.source.name
        quantizer = submodule(gm, call)
        if edge.arg is Arg.WEIGHT:
            if not isinstance(quantizer, UniformQuantizer) or len(call.users) > 1:
                return
            weight = get_parameter(gm, operand(call, 0)).detach()
            form = _weight_form(weight, quantizer, options, generator)
            if form is not None:
                self.weights[name] = form
            return
        assert isinstance(quantizer, Quantizer)
        coder = trained(quantizer, options.drop)
        if coder is not None and name not in self.quantizers:
            coder.requires_grad_(options.scales)
            self.quantizers[name] = coder

    def forward(self, values: Values) -> Values:
        """The block's outputs by name, with gradients."""
        station = self._station
        overrides: dict[str, Callable[..., Any]] = {}
        for name, quantizer in self.quantizers.items():
            overrides[name] = quantizer
        for name, weight in self.weights.items():
            overrides[name] = _ignoring(weight)
        for name, node in self._bias_nodes.items():
            overrides[name] = _ignoring(partial(self.biases.__getitem__, node))
        with torch.autocast(station.device.type, torch.bfloat16, enabled=self._bf16):
            found = station.student.run_block(station.block, values, overrides=overrides)
        return {name: value.float() for name, value in tensors_of(station.block, found).items()}

    def groups(self, options: Reconstruction) -> list[dict[str, Any]]:
        """Parameters with their learning rates; those of biases follow the scales."""
        rates: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                slow = name.endswith(("log_scale", "offset")) or name.startswith("biases")
                rate = options.scale_rate if slow else options.weight_rate
                rates.setdefault(rate, []).append(parameter)
        return [{"params": group, "lr": rate} for rate, group in rates.items()]

    def regularizer(self, progress: float) -> Tensor | None:
        """The mean of those of its weights; None where there is none."""
        found = [w.regularizer(progress) for w in self.weights.values()]  # type: ignore[operator]
        terms = [term for term in found if term is not None]
        return torch.stack(terms).mean() if terms else None

    @torch.no_grad()
    def changes(self) -> Changes:
        """What it has become."""
        quantizers: dict[str, Quantizer] = {}
        weights: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            assert isinstance(weight, TrainedWeight)
            weights[name], quantizers[name] = weight.fitted()
        for name, form in self.quantizers.items():
            assert isinstance(form, TrainedQuantizer)
            quantizers[name] = form.fitted()
        biases = {name: bias.detach().clone() for name, bias in self.biases.items()}
        ranks = {n: form.rank for n, form in self.weights.items() if isinstance(form, LowRank)}
        return Changes(quantizers, weights, biases, ranks)

    @property
    def searches_ranks(self) -> bool:
        """Whether the rank of a weight is still open."""
        return any(isinstance(form, RankSearch) for form in self.weights.values())

    def settle_ranks(self) -> None:
        """Leaves each weight the rank it prefers."""
        for name, form in self.weights.items():
            if isinstance(form, RankSearch):
                self.weights[name] = form.settled()


def _weight_form(
    weight: Tensor, quantizer: UniformQuantizer, options: Reconstruction, generator: torch.Generator
) -> TrainedWeight | None:
    """What the options make of a weight; None where it is not trained."""
    match options.weights:
        case WeightTraining.NONE:
            return None
        case WeightTraining.ADAROUND:
            return AdaRound(weight, quantizer, scales=options.scales)
        case WeightTraining.STRAIGHT_THROUGH:
            return StraightThrough(weight, quantizer, scales=options.scales)
    ranks = candidate_ranks(options.ranks, weight)
    more: dict[str, Any] = {"scales": options.scales, "generator": generator}
    if len(ranks) > 1:
        return RankSearch(weight, quantizer, ranks=ranks, **more)
    return LowRank(weight, quantizer, rank=ranks[0], **more)


def _ignoring(call: Callable[[], Tensor]) -> Callable[..., Tensor]:
    return lambda *_: call()


def _biases(gm: fx.GraphModule, own: Iterable[fx.Node]) -> Iterator[tuple[fx.Node, Tensor]]:
    """Those of products in the block that nothing else reads."""
    for node in own:
        if op_kind(node) not in (OpKind.LINEAR, OpKind.CONV) or len(node.args) < 3:
            continue
        bias = node.args[2]
        if isinstance(bias, fx.Node) and bias.op == "get_attr" and len(bias.users) == 1:
            yield node, get_parameter(gm, bias)


def train_block(
    block: TrainedBlock,
    station: Station,
    criterion: Criterion,
    options: Reconstruction,
    parts: tuple[Tensor, Tensor],
) -> tuple[Changes | None, float, float]:
    """Trains a block.

    Args:
        block: its trained parts; changed.
        station: its data.
        criterion: its loss.
        options: steps and rates.
        parts: numbers of the images that judge, and of those that train (:func:`split`).

    Returns:
        What the block was when its loss was least, None where that is before the first step; and
        the loss before and then: without drops, the mean over the images held out.
    """
    generator = torch.Generator().manual_seed(options.seed)
    judges, own = parts
    before = least = float(image_losses(block, station, criterion, judges).mean())
    best: Changes | None = None
    if not block.groups(options) or not 0 < before < math.inf:
        return None, before, before
    if block.searches_ranks:
        _search_ranks(block, station, criterion, options, before, own)
    groups = block.groups(options)
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / options.iterations))
    )
    parameters = [p for group in groups for p in group["params"]]
    plan = Curriculum(len(own), options.batch, options.iterations, options.curriculum, generator)
    every = max(1, options.iterations // _LOOKS)
    for step in range(options.iterations):
        if plan.sorts and step % every == 0:
            plan.sort(image_losses(block, station, criterion, own))
        block.train()
        with torch.enable_grad():
            index = own[plan.draw(step)]
            loss = _step_loss(block, station, criterion, index, options.drop) / before
            push = block.regularizer(step / options.iterations)
            total = loss if push is None else loss + _PUSH * push
            optimizer.zero_grad()
            total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        schedule.step()
        if (step + 1) % every == 0 or step + 1 == options.iterations:
            now = float(image_losses(block, station, criterion, judges).mean())
            if now < least:
                least, best = now, block.changes()
    return best, before, least


def split(count: int, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers of the images that judge and of those that train.

    At least one judges; where there is no other, or share is 0, all do both.
    """
    held = max(1, round(share * count)) if share else 0
    if not 0 < held < count:
        return torch.arange(count), torch.arange(count)
    order = torch.randperm(count, generator=generator)
    return order[:held].sort().values, order[held:].sort().values


def _search_ranks(
    block: TrainedBlock,
    station: Station,
    criterion: Criterion,
    options: Reconstruction,
    unit: float,
    images: Tensor,
) -> None:
    """Trains factors on one half of the images and preferences on the other, in turns.

    Args:
        block: with open ranks; settled in the end.
        station: its data.
        criterion: its loss.
        options: steps and rates; preferences take ten times the rate of the weights.
        unit: the loss that counts as one.
        images: numbers of those it takes.
    """
    generator = torch.Generator().manual_seed(options.seed)
    named = dict(block.named_parameters())
    turns = [
        [p for n, p in named.items() if p.requires_grad and n.endswith("preference") == second]
        for second in (False, True)
    ]
    rates = options.weight_rate, 10 * options.weight_rate
    optimizers = [torch.optim.Adam(p, lr=r) for p, r in zip(turns, rates, strict=True)]
    halves = images[torch.randperm(len(images), generator=generator)].chunk(2)
    block.train()
    for step in range(options.rank_iterations):
        turn = step % len(halves)
        own = halves[turn]
        index = own[torch.randperm(len(own), generator=generator)[: options.batch]]
        with torch.enable_grad():
            loss = _step_loss(block, station, criterion, index, options.drop) / unit
            block.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        optimizers[turn].step()
    block.settle_ranks()


def _step_loss(
    block: TrainedBlock, station: Station, criterion: Criterion, index: Tensor, drop: float
) -> Tensor:
    given = station.given.get(index, station.device)
    # What comes in is left unquantized for as large a share as what is computed.
    if drop and station.given is not station.exact:
        exact = station.exact.get(index, station.device)
        given = {
            name: torch.lerp(value, exact[name], draw_mask(value, drop))
            for name, value in given.items()
        }
    return criterion(block(given), station.target.get(index, station.device), index).mean()


@torch.no_grad()
def image_losses(
    block: TrainedBlock, station: Station, criterion: Criterion, images: Tensor
) -> Tensor:
    """The loss of each of some images, ``(n,)``, without drops.

    Args:
        block: its trained parts.
        station: its data.
        criterion: its loss.
        images: their numbers, ``(n,)``.
    """
    block.eval()
    found = []
    for index in torch.split(images, CHUNK):
        given, target = (
            shelf.get(index, station.device) for shelf in (station.given, station.target)
        )
        found.append(criterion(block(given), target, index))
    return torch.cat(found)
