"""The trained quantizers, weights and biases of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.config.recovery import Reconstruction, WeightTraining
from fxquant.config.vocabulary import Arg
from fxquant.graph.dialect import op_kind
from fxquant.graph.edges import Edge, quantized_edges
from fxquant.graph.macs import MacCounter
from fxquant.graph.nodes import get_parameter, operand, submodule
from fxquant.graph.products import Product
from fxquant.quantizers import FAMILIES, Quantizer, UniformQuantizer
from fxquant.quantizers.trained import TrainedQuantizer
from fxquant.reconstruction.blockwise import BlockContext, Values, tensors_of
from fxquant.reconstruction.rank_search import PREFERENCE, RankSearch, candidate_ranks
from fxquant.reconstruction.weights import (
    AdaRound,
    FixedCodes,
    LowRankWeight,
    StraightThrough,
    TrainedWeight,
)

# Bytes that a step holds for each value of a block: for a quantizer a slope and a mask, four bytes
# each, for most other nodes their value. The network after the block, which loss feature runs, is
# not counted.
_BYTES_PER_VALUE = 8
# Prefix of the names of nodes as keys of module dictionaries, which refuse some names, e.g. "keys".
_KEY_PREFIX = "of_"
# Learning rate of preferences for ranks, over that of the weights.
_PREFERENCE_RATE_FACTOR = 10


@dataclass(frozen=True)
class Changes:
    """The trained quantizers, weights and biases of a block.

    Attributes:
        quantizers: trained quantizers by name of the calling node.
        weights: weights before rounding, by name of the node that reads the weight.
        biases: trained biases by name of the product.
        ranks: ranks of low-rank changes, by name of the node that reads the weight.
    """

    quantizers: Mapping[str, Quantizer]
    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    ranks: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of the training of a block.

    Attributes:
        changes: the block at its least loss; None where the loss is least before the first step.
        loss_before: mean loss of the validation images before the first step, without drops.
        loss_after: the least mean loss, before the first step or at a later validation.
    """

    changes: Changes | None
    loss_before: float
    loss_after: float


class TrainedBlock(nn.Module):
    """A block with its trained quantizers, weights and biases.

    Args:
        gm: the quantized graph.
        context: the block with its data.
        options: the parameters to train.
        generator: draws initial values.

    Attributes:
        bytes_per_image: estimated memory of a step for each image.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        context: BlockContext,
        options: Reconstruction,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.quantizers, self.weights = nn.ModuleDict(), nn.ModuleDict()
        self.biases = nn.ParameterDict()
        self._bias_nodes: dict[str, str] = {}
        self._context, self._bf16 = context, options.bf16
        nodes = context.block.nodes  # in order: sums over parameters are the same in each run
        macs = MacCounter(gm)
        values = sum(macs.values(n) for n in nodes if isinstance(n.meta.get("val"), Tensor))
        self.bytes_per_image = max(1, _BYTES_PER_VALUE * values)
        for edge in quantized_edges(gm):
            if edge.node in nodes:
                self._add_edge(gm, edge, options, generator)
        if options.biases:
            for node, bias in _biases(gm, nodes):
                key = _KEY_PREFIX + node.name
                self.biases[key] = nn.Parameter(get_parameter(gm, bias).detach().clone())
                self._bias_nodes[bias.name] = key

    def _add_edge(
        self,
        gm: fx.GraphModule,
        edge: Edge,
        options: Reconstruction,
        generator: torch.Generator,
    ) -> None:
        call, key = edge.source, _KEY_PREFIX + edge.source.name
        quantizer = submodule(gm, call)
        if refusal(gm, edge, options) is not None:
            return
        if edge.arg is Arg.WEIGHT:
            assert isinstance(quantizer, UniformQuantizer)
            weight = get_parameter(gm, operand(call, 0)).detach()
            trained_weight = _weight_form(weight, quantizer, options, generator)
            if trained_weight is not None:
                self.weights[key] = trained_weight
            return
        assert isinstance(quantizer, Quantizer) and edge.spec is not None
        form = FAMILIES[edge.spec.scheme].trained
        if form is not None and key not in self.quantizers:
            trained_quantizer = form(quantizer, options.drop)
            if not options.scales:  # otherwise the form decides: some train no zero point
                trained_quantizer.requires_grad_(False)
            self.quantizers[key] = trained_quantizer

    def forward(self, values: Values) -> Values:
        """Runs the block; returns its outputs by name, with gradients."""
        context = self._context
        overrides: dict[str, Callable[..., Any]] = dict(_by_node(self.quantizers))
        overrides |= {name: _ignoring(weight) for name, weight in _by_node(self.weights)}
        for name, key in self._bias_nodes.items():
            overrides[name] = _ignoring(partial(self.biases.__getitem__, key))
        with torch.autocast(context.device.type, torch.bfloat16, enabled=self._bf16):
            results = context.student.run_block(context.block, values, overrides=overrides)
        return {name: value.float() for name, value in tensors_of(context.block, results).items()}

    def groups(self, options: Reconstruction) -> list[dict[str, Any]]:
        """Parameter groups with their learning rates.

        Biases have the rate of the scales, preferences for ranks ten times that of the weights.
        """
        rates: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                slow = name.endswith(("log_scale", "offset")) or name.startswith("biases")
                rate = options.scale_rate if slow else options.weight_rate
                if name.endswith(PREFERENCE):
                    rate *= _PREFERENCE_RATE_FACTOR
                rates.setdefault(rate, []).append(parameter)
        return [{"params": group, "lr": rate} for rate, group in rates.items()]

    def regularizer(self, progress: float) -> Tensor | None:
        """The mean of the regularizers of the weights; None where no weight has a regularizer.

        Args:
            progress: share of the steps that are done.
        """
        terms = [w.regularizer(progress) for w in self.weights.values()]  # type: ignore[operator]
        terms = [term for term in terms if term is not None]
        return torch.stack(terms).mean() if terms else None

    @torch.no_grad()
    def changes(self) -> Changes:
        """The trained quantizers, weights and biases in the form that the graph uses."""
        quantizers: dict[str, Quantizer] = {}
        weights: dict[str, Tensor] = {}
        for name, weight in _by_node(self.weights):
            assert isinstance(weight, TrainedWeight)
            weights[name], quantizers[name] = weight.fitted()
        for name, form in _by_node(self.quantizers):
            assert isinstance(form, TrainedQuantizer)
            quantizers[name] = form.fitted()
        biases = {
            k.removeprefix(_KEY_PREFIX): bias.detach().clone() for k, bias in self.biases.items()
        }
        return Changes(quantizers, weights, biases, self.ranks)

    @property
    def searches_ranks(self) -> bool:
        """Whether the rank of a weight is still open."""
        return any(isinstance(form, RankSearch) for form in self.weights.values())

    @property
    def ranks(self) -> dict[str, int]:
        """Settled ranks of low-rank changes, by name of the node that reads the weight."""
        forms = _by_node(self.weights)
        return {name: form.rank for name, form in forms if isinstance(form, LowRankWeight)}

    def settle_ranks(self, ranks: Mapping[str, int] | None = None) -> None:
        """Settles the rank of each weight: the preferred rank, or the rank in ``ranks``."""
        for name, form in _by_node(self.weights):
            if isinstance(form, RankSearch):
                settled = form.settled(None if ranks is None else ranks[name])
                self.weights[_KEY_PREFIX + name] = settled


def refusal(gm: fx.GraphModule, edge: Edge, options: Reconstruction) -> str | None:
    """The reason why an edge's quantizer or weight is not trained as the options ask; else None."""
    if edge.arg is Arg.WEIGHT:
        shared = len(edge.source.users) > 1 and options.weights is not WeightTraining.NONE
        return "weight not trained: several products share it" if shared else None
    quantizer = submodule(gm, edge.source)
    assert isinstance(quantizer, Quantizer) and edge.spec is not None
    if options.scales and FAMILIES[edge.spec.scheme].trained is None:
        return f"scale of {edge.arg} not trained: {type(quantizer).__name__} has no trained form"
    return None


def _by_node(forms: nn.ModuleDict) -> list[tuple[str, nn.Module]]:
    """The forms with the names of their nodes."""
    return [(key.removeprefix(_KEY_PREFIX), form) for key, form in forms.items()]


def _weight_form(
    weight: Tensor, quantizer: UniformQuantizer, options: Reconstruction, generator: torch.Generator
) -> TrainedWeight | None:
    """The trained form of a weight that the options ask for; None where it is not trained."""
    match options.weights:
        case WeightTraining.NONE:
            return None
        case WeightTraining.ADAROUND:
            return AdaRound(weight, quantizer, scales=options.scales)
        case WeightTraining.STRAIGHT_THROUGH:
            return StraightThrough(weight, quantizer, scales=options.scales)
        case WeightTraining.SCALES:
            return FixedCodes(weight, quantizer, scales=True)
    ranks = candidate_ranks(options.ranks, weight)
    if len(ranks) > 1:
        return RankSearch(
            weight, quantizer, scales=options.scales, ranks=ranks, generator=generator
        )
    return LowRankWeight(
        weight, quantizer, scales=options.scales, rank=ranks[0], generator=generator
    )


def _ignoring(call: Callable[[], Tensor]) -> Callable[..., Tensor]:
    return lambda *_: call()


def _biases(gm: fx.GraphModule, nodes: Iterable[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Products with the nodes of their constant biases, where no other node reads the bias."""
    for node in nodes:
        bias = None if op_kind(node) is None else Product(gm, node).bias_node
        if bias is not None and bias.op == "get_attr" and len(bias.users) == 1:
            yield node, bias
