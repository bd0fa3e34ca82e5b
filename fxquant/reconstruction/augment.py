"""Images that a network is fitted to besides those given: moved, recoloured, mixed.

A few images carry a network far where all that is asked of it is to give what the float one gives:
any image will do that looks somewhat like those given, and many are made of few ("function
matching", arXiv 2106.05237, there by divergence and over long schedules). Labels play no part, so
that it does not matter whether an image still shows what it showed.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from fxquant.reconstruction.blockwise import (
    ActivationStore,
    BlockContext,
    Values,
    chunks,
    tensors_of,
)

# By trial on glyph_vit and glyph_swin with 32 images, where less gained less. Largest factors of
# size and of the ratio of width to height, turn, and shift as a share of the half image.
_ZOOM, _STRETCH, _TURN, _SHIFT = 1.25, 1.15, math.radians(15), 0.15
# Share of the images that are moved: the others keep the noise that resampling smooths away.
_MOVED = 0.75
# Standard deviations of a channel's factor, and of what is added to it in those of the images.
_COLOUR = 0.2
# Share of the images that are mixed with another, and the largest share of that one.
_MIXED, _OTHER = 0.5, 0.3


@torch.no_grad()
def fresh(context: BlockContext, index: Tensor, count: int) -> BlockContext:
    """The same block on other images, which are made of some of its images.

    Args:
        context: of the whole network.
        index: numbers of the images to make others of, ``(n,)``.
        count: number of images to make, all held in memory.
    """
    inputs, float_outputs = ActivationStore(count), ActivationStore(count)
    sources = index[_sources(len(index), count)]
    for part in chunks(count):
        images = context.quantized_inputs.get(sources[part], torch.device("cpu"))
        made = {name: augmented(value) for name, value in images.items()}
        inputs.put(part.start, made)
        on_device = {name: value.to(context.device) for name, value in made.items()}
        float_outputs.put(part.start, float_targets(context, on_device))
    return replace(
        context,
        float_inputs=inputs,
        quantized_inputs=inputs,
        float_outputs=float_outputs,
        count=count,
    )


def _made_of(images: Tensor, count: int) -> Tensor:
    """``count`` images made of others ``(B, …)``, by torch's generator of the CPU."""
    sources = _sources(len(images), count)
    return torch.cat([augmented(images[sources[part]]) for part in chunks(count)])


def made_in_folds(images: Tensor, count: int, folds: int) -> list[Tensor]:
    """Images in folds, with ``count`` more that are made of images of the same fold.

    In this way weights that are fitted to an image are not tested on one that was made of it.

    Args:
        images: ``(B, …)`` on the CPU, B at least ``folds``.
        count: number of images to make, in all folds together.
        folds: number of folds.

    Returns:
        For each fold its images and the images made of them, ``(n, …)``.
    """
    groups = []
    for fold, group in enumerate(images.tensor_split(folds)):
        made = count // folds + (fold < count % folds)
        groups.append(torch.cat((group, _made_of(group, made))) if made else group)
    return groups


def _sources(images: int, count: int) -> Tensor:
    """Numbers of images to make others of, each as often as the next."""
    # On the CPU, so that they are the same on every device.
    rounds = [torch.randperm(images) for _ in range(-(-count // images))]
    return torch.cat(rounds)[:count]


@torch.no_grad()
def float_targets(context: BlockContext, inputs: Values) -> Values:
    """The outputs of the float block."""
    copies = {name: value.clone() for name, value in inputs.items()}  # some models change them
    return tensors_of(context.block, context.teacher.run_block(context.block, copies))


def augmented(x: Tensor) -> Tensor:
    """Other images made of some, by torch's generator of the device.

    Args:
        x: ``(B, C, H, W)``; values of any other shape ``(B, …)`` are mixed alone.

    Returns:
        As many, of the same shape and type, each channel within the range that it has in ``x``.
    """
    return _mixed(_recoloured(_moved(x)) if x.ndim == 4 else x)


def _spread(x: Tensor, *shape: int) -> Tensor:
    """Uniform numbers in [-1, 1] on the device of ``x``."""
    return torch.rand(shape, device=x.device) * 2 - 1


def _moved(x: Tensor) -> Tensor:
    """Most images turned, stretched, scaled and shifted; what comes in at the edges is mirrored."""
    count, ratio = len(x), x.shape[2] / x.shape[3]
    zoom, stretch = (limit ** _spread(x, count) for limit in (_ZOOM, _STRETCH))
    turn, shift = _TURN * _spread(x, count), _SHIFT * _spread(x, count, 2)
    across, down = zoom * stretch, zoom / stretch
    # Coordinates are shares of the half width and half height.
    rows = (
        torch.stack((across * turn.cos(), -across * ratio * turn.sin(), shift[:, 0]), 1),
        torch.stack((down / ratio * turn.sin(), down * turn.cos(), shift[:, 1]), 1),
    )
    grid = affine_grid(torch.stack(rows, 1).to(x.dtype), list(x.shape), align_corners=False)
    moved = grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    return torch.where(torch.rand(count, 1, 1, 1, device=x.device) < _MOVED, moved, x)


def _recoloured(x: Tensor) -> Tensor:
    """Each channel of an image times a factor, plus a constant, within the range of the channel.

    What is beyond it no camera gives, and some models have no value for it.
    """
    drawn = _COLOUR * torch.randn((2, *x.shape[:2], 1, 1), device=x.device, dtype=x.dtype)
    low, high = x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)
    return (x * (1 + drawn[0]) + drawn[1] * x.std()).clamp(low, high)


def _mixed(x: Tensor) -> Tensor:
    """Some of the images with a share of another one (arXiv 1710.09412)."""
    shape = (len(x), *(1 for _ in x.shape[1:]))
    share = _OTHER * torch.rand(shape, device=x.device, dtype=x.dtype)
    share = share * (torch.rand(shape, device=x.device) < _MIXED)
    other = x[torch.randperm(len(x), device=x.device)]
    return x + share * (other - x)
