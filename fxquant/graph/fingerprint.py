"""A fingerprint of all that a measured loss or a trained block depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, fx

from fxquant._version import __version__
from fxquant.graph.edges import quantized_edges
from fxquant.graph.meta import EMBEDDINGS, PACKED_WEIGHT, PINNED_ARGS
from fxquant.observers.observer import HistogramObserver, Observer


def fingerprint(gm: fx.GraphModule, images: Tensor, *settings: object) -> str:
    """Hash of all that losses depend on.

    The hash covers versions, graph, weights, statistics, specs, images and options.

    Args:
        gm: in stage OBSERVED, after calibration.
        images: images on which losses are measured, ``(B, …)``.
        *settings: options that change a loss, as text.
    """
    digest = hashlib.sha256(repr((__version__, torch.__version__, settings)).encode())
    for node in gm.graph.nodes:
        digest.update(f"{node.name} {node.target} {node.args} {node.kwargs}\n".encode())
    embeddings = EMBEDDINGS.get(gm)
    if embeddings:
        digest.update(f"embeddings {sorted(embeddings)}\n".encode())
    for edge in quantized_edges(gm):
        groups = sorted(PINNED_ARGS.get(edge.node) or ()), PACKED_WEIGHT.get(edge.node)
        digest.update(f"{edge.name} {edge.spec} {groups}\n".encode())
    for name, tensor in _tensors(gm):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    digest.update(images.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _tensors(gm: fx.GraphModule) -> Iterable[tuple[str, Tensor]]:
    yield from (*gm.named_parameters(), *gm.named_buffers())
    for name, observer in gm.named_modules():
        if isinstance(observer, Observer):
            yield f"{name} range", torch.stack(observer.range())
        if isinstance(observer, HistogramObserver):
            assert observer.counts is not None
            yield f"{name} counts", observer.counts
