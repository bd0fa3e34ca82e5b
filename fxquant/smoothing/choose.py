"""Chooses the smoothing of each site of a graph by the loss of the network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from fxquant.calibration.network_loss import NetworkLoss
from fxquant.calibration.observe import observe
from fxquant.calibration.reservoir import ReservoirSampler, images_for
from fxquant.calibration.user_loss import Loss
from fxquant.config.scale_search import Metric, ScaleSearch
from fxquant.config.spec import Granularity
from fxquant.config.vocabulary import Arg
from fxquant.graph.capture import device_of
from fxquant.graph.dialect import aten
from fxquant.graph.edges import Edge
from fxquant.graph.macs import MacCounter
from fxquant.quantizers import has_uniform_grid
from fxquant.search.product_loss import ProductSample
from fxquant.smoothing.candidates import (
    ConsumerSample,
    Smoothing,
    TrialFold,
    finalists,
    folded_sample,
)
from fxquant.smoothing.fold_sites import Site, linear_sites, norm_sites
from fxquant.utils.notes import Refusal
from fxquant.utils.progress import track

# Largest loss with the map over the loss without. The search of scales that follows is finer than
# the quantizers on trial, and makes up for smaller gains: on glyph_vit at 4 bits, folds with 0.5 to
# 0.8 raised the loss of the whole network by a twentieth.
MAX_LOSS_RATIO = 0.5
# Multiplications for measuring losses: about half a minute on two AVX2 cores.
_MAX_MACS = 2e12
# Number of finalists at a site where channels may be shifted.
_FINALISTS_PER_SITE = 5


@dataclass(frozen=True)
class FoldDecision:
    """The decision for a site.

    Attributes:
        site: the site.
        smoothing: the map of the site's channels.
        gain: loss of the network with the site's products quantized: with the map over without.
    """

    site: Site
    smoothing: Smoothing
    gain: float


@dataclass(frozen=True)
class FoldDecisions:
    """The decisions for a graph.

    Attributes:
        folds: decision by name of the site's source.
        refused: reason by name of the source, for the sites that stay unchanged.
        samples: rows of each product by node name, as after the folds.
    """

    folds: Mapping[str, FoldDecision]
    refused: Mapping[str, str]
    samples: dict[str, ProductSample]


def choose_smoothing(
    gm: fx.GraphModule,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    search: ScaleSearch,
    loss: Loss | None = None,
    *,
    progress: bool = False,
) -> FoldDecisions:
    """Chooses a map of channels at each site where it halves the loss of the network.

    The loss compares the network's outputs with the float ones, on some of the images, with the
    products of the site alone quantized.

    Args:
        gm: in stage ANNOTATED, not changed.
        batches: images ``(B, …)`` with labels.
        search: the metric of the output error for finalists, and the loss.
        loss: user's loss of outputs and labels, as in `observe`.
        progress: show progress on stderr.
    """
    sites = [*norm_sites(gm), *linear_sites(gm)]
    starts = [site.source for _, site in sites if isinstance(site, Site)]
    sampler = ReservoirSampler(
        images_for(_MAX_MACS, _FINALISTS_PER_SITE * MacCounter(gm).macs_after(starts)), search.seed
    )
    samples = observe(gm, batches, search=search, loss=loss, reservoir=sampler).samples
    comparable, refused = _comparable_sites(sites, samples)
    folds = {}
    with torch.no_grad():
        network = NetworkLoss(gm, sampler.images.to(device_of(gm)), search.loss)
        comparable.sort(key=lambda item: min(network.place[node] for node in _nodes(item[0])))
        for site, consumers in track(
            comparable, label="smooth", total=len(comparable), enabled=progress
        ):
            choice = _choose(network, site, consumers, search.metric)
            if choice.gain <= MAX_LOSS_RATIO:
                folds[site.source.name] = choice
            else:
                refused[site.source.name] = (
                    f"not smoothed: the loss would be {choice.gain:.2f} of that without, and "
                    f"{MAX_LOSS_RATIO} is asked for"
                )
        return FoldDecisions(folds, refused, _folded_samples(samples, folds.values()))


def _choose(
    network: NetworkLoss, site: Site, consumers: list[ConsumerSample], metric: Metric
) -> FoldDecision:
    """The finalist of least loss; the first finalist changes nothing."""
    candidates = finalists(consumers, metric, shiftable=site.shiftable)
    losses = []
    for smoothing in candidates:
        trial = TrialFold(consumers, smoothing, metric)
        overrides = dict(zip(_nodes(site), trial.overrides, strict=True))
        losses.append(network.changed(overrides))
    best = losses.index(min(losses))
    return FoldDecision(site, candidates[best], losses[best] / losses[0] if best else 1.0)


def _comparable_sites(
    sites: Iterable[tuple[fx.Node, Site | Refusal]], samples: Mapping[str, ProductSample]
) -> tuple[list[tuple[Site, list[ConsumerSample]]], dict[str, str]]:
    """Sites with their consumers, and reasons for the other sites by name of the source."""
    comparable: list[tuple[Site, list[ConsumerSample]]] = []
    refused: dict[str, str] = {}
    for source, site in sites:
        consumers = site if isinstance(site, Refusal) else _consumer_samples(site, samples)
        if isinstance(site, Refusal) or isinstance(consumers, Refusal):
            refused[source.name] = f"not smoothed: {consumers}"
        else:
            comparable.append((site, consumers))
    return comparable, refused


def _nodes(site: Site) -> tuple[fx.Node, ...]:
    """The linears of a site, and the attention products whose values are quantized."""
    values = [node for node in site.products if Edge(node, Arg.RHS).spec is not None]
    return (*site.linears, *values)


def _consumer_samples(
    site: Site, samples: Mapping[str, ProductSample]
) -> list[ConsumerSample] | Refusal:
    """Rows of the products that read a site's channels, or why they cannot be compared."""
    consumers = []
    channels = int(site.source.meta["val"].shape[-1])
    for node in _nodes(site):
        left = node in site.linears
        spec = Edge(node, Arg.INPUT if left else Arg.RHS).spec
        sample = samples.get(node.name)
        if spec is None:
            return Refusal(f"the input of {node} stays float")
        expected = Granularity.TENSOR if left else Granularity.HEAD
        if not has_uniform_grid(spec) or spec.granularity is not expected:
            return Refusal(
                f"the input quantizer of {node} is not uniform with one scale per {expected}"
            )
        if sample is None or (not left and sample.heads * sample.columns != channels):
            return Refusal(f"no rows of {node} were sampled in a form that shows its channels")
        consumers.append(ConsumerSample(sample, spec, Edge(node, Arg.WEIGHT).spec, left))
    if len({consumer.spec for consumer in consumers if consumer.left}) > 1:
        return Refusal("the linears that read it quantize it differently")
    return consumers


def _folded_samples(
    samples: Mapping[str, ProductSample], choices: Iterable[FoldDecision]
) -> dict[str, ProductSample]:
    """Rows of all products, as after the folds."""
    folded = dict(samples)
    for choice in choices:
        site, smoothing = choice.site, choice.smoothing
        for node in (*site.linears, *site.products):
            if node.name in folded:
                left = node in site.linears
                folded[node.name] = folded_sample(folded[node.name], smoothing, left=left)
        source = folded.get(site.source.name)
        if source is not None and site.source.target is aten.linear.default:
            gradient = None if source.gradient is None else source.gradient * smoothing.divide
            rhs = source.rhs / smoothing.divide
            folded[site.source.name] = replace(source, rhs=rhs, gradient=gradient)
    return folded
