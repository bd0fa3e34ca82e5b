"""Chooses the smoothing of every site of a graph by the loss of the network."""

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
from fxquant.config.spec import Granularity, Scheme, TensorSpec
from fxquant.config.vocabulary import Arg
from fxquant.graph.capture import device_of
from fxquant.graph.dialect import aten
from fxquant.graph.macs import MacCounter
from fxquant.search.product_loss import ProductSample
from fxquant.smoothing.candidates import (
    ConsumerSample,
    Smoothing,
    TrialFold,
    finalists,
    folded_sample,
)
from fxquant.smoothing.fold_sites import Site, linear_sites, norm_sites
from fxquant.utils.progress import track

# Of the loss without. What finalists are tried with is rougher than the search of scales to follow,
# which makes up for smaller gains: on glyph_vit at 4 bits, folds of 0.5 to 0.8 raised the loss of
# the whole network by a twentieth.
MAX_LOSS_RATIO = 0.5
# Multiplications that measuring the loss may take: some half a minute on two AVX2 cores.
_WORK = 2e12
# Finalists of a site where channels may be shifted.
_FINALISTS = 5


@dataclass(frozen=True)
class FoldDecision:
    """What was decided for a site.

    Attributes:
        site: of the graph.
        smoothing: the map of its channels.
        gain: loss of the network with its products quantized, with the map over without.
    """

    site: Site
    smoothing: Smoothing
    gain: float


@dataclass(frozen=True)
class FoldDecisions:
    """What was decided for a graph.

    Attributes:
        folds: by name of the site's source.
        refused: why the other sites stay as they are, by the same names.
        samples: rows of each product by node name, as they are after the folds.
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
    """The map of channels at each site whose loss is at most half of that without.

    The loss is that of the network's outputs, on some of the images, with only the products of the
    site quantized.

    Args:
        gm: in stage ANNOTATED, not changed.
        batches: images ``(B, …)`` with labels.
        search: the metric that finalists are chosen by, and the loss.
        loss: of outputs and labels, as in `observe`.
        progress: show progress on stderr.
    """
    sites = [*norm_sites(gm), *linear_sites(gm)]
    starts = [site.source for _, site in sites if isinstance(site, Site)]
    picked = ReservoirSampler(
        images_for(_WORK, _FINALISTS * MacCounter(gm).macs_after(starts)), search.seed
    )
    samples = observe(gm, batches, search=search, loss=loss, reservoir=picked).samples
    found, refused = _compared(sites, samples)
    folds = {}
    with torch.no_grad():
        network = NetworkLoss(gm, picked.images.to(device_of(gm)), search.loss)
        found.sort(key=lambda item: min(network.place[node] for node in _nodes(item[0])))
        for site, readings in track(found, label="smooth", total=len(found), enabled=progress):
            choice = _choose(network, site, readings, search.metric)
            if choice.gain <= MAX_LOSS_RATIO:
                folds[site.source.name] = choice
            else:
                refused[site.source.name] = (
                    f"not smoothed: the loss would be {choice.gain:.2f} of that without, and "
                    f"{MAX_LOSS_RATIO} is asked for"
                )
        return FoldDecisions(folds, refused, _folded_samples(samples, folds.values()))


def _choose(
    network: NetworkLoss, site: Site, readings: list[ConsumerSample], metric: Metric
) -> FoldDecision:
    """The finalist of least loss, the first of which is no change."""
    tried = finalists(readings, metric, shiftable=site.shiftable)
    losses = []
    for smoothing in tried:
        trial = TrialFold(readings, smoothing, metric)
        instead = dict(zip(_nodes(site), trial.instead, strict=True))
        losses.append(network.changed(instead))
    best = losses.index(min(losses))
    return FoldDecision(site, tried[best], losses[best] / losses[0] if best else 1.0)


def _compared(
    sites: Iterable[tuple[fx.Node, Site | str]], samples: Mapping[str, ProductSample]
) -> tuple[list[tuple[Site, list[ConsumerSample]]], dict[str, str]]:
    """Sites with what reads them; and why others cannot be compared, by name of the source."""
    found: list[tuple[Site, list[ConsumerSample]]] = []
    refused: dict[str, str] = {}
    for source, site in sites:
        readings = site if isinstance(site, str) else _readings(site, samples)
        if isinstance(readings, str) or isinstance(site, str):
            refused[source.name] = f"not smoothed: {readings}"
        else:
            found.append((site, readings))
    return found, refused


def _nodes(site: Site) -> tuple[fx.Node, ...]:
    """All products that read the channels of a site and are quantized there."""
    values = [n for n in site.products if n.meta.get("quant", {}).get(Arg.RHS) is not None]
    return (*site.linears, *values)


def _readings(site: Site, samples: Mapping[str, ProductSample]) -> list[ConsumerSample] | str:
    """What reads a site's channels, or a clause why it cannot be compared."""
    found = []
    channels = _channels(site)
    for node in _nodes(site):
        left = node in site.linears
        specs: Mapping[Arg, TensorSpec] = node.meta.get("quant", {})
        spec, sample = specs.get(Arg.INPUT if left else Arg.RHS), samples.get(node.name)
        if spec is None:
            return f"the input of {node} stays float"
        wanted = Granularity.TENSOR if left else Granularity.HEAD
        if spec.scheme is not Scheme.UNIFORM or spec.granularity is not wanted:
            return f"the quantizer of what {node} reads is not uniform with a scale a {wanted}"
        if sample is None or (not left and sample.heads * sample.columns != channels):
            return f"no rows of {node} were sampled in a form that shows its channels"
        found.append(ConsumerSample(sample, spec, specs.get(Arg.WEIGHT), left))
    if len({reading.spec for reading in found if reading.left}) > 1:
        return "the linears that read it quantize it differently"
    return found


def _channels(site: Site) -> int:
    return int(site.source.meta["val"].shape[-1])


def _folded_samples(
    samples: Mapping[str, ProductSample], choices: Iterable[FoldDecision]
) -> dict[str, ProductSample]:
    """The rows of all products as they are after the folds."""
    found = dict(samples)
    for choice in choices:
        site, smoothing = choice.site, choice.smoothing
        for node in (*site.linears, *site.products):
            if node.name in found:
                left = node in site.linears
                found[node.name] = folded_sample(found[node.name], smoothing, left=left)
        own = found.get(site.source.name)
        if own is not None and site.source.target is aten.linear.default:
            gradient = None if own.gradient is None else own.gradient * smoothing.divide
            rhs = own.rhs / smoothing.divide
            found[site.source.name] = replace(own, rhs=rhs, gradient=gradient)
    return found
