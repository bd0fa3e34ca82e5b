"""Augmentation of the calibration images: images are warped, recoloured and mixed.

A quantized network that is trained to reproduce the outputs of the float network needs few images:
any image similar to the calibration images is useful, and many such images are made of a few
("function matching", arXiv 2106.05237, there by divergence and over long schedules). Training uses
no labels: an augmented image need not show the same object any more.
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

# Chosen by trial on glyph_vit and glyph_swin with 32 images, where weaker augmentation gained less.
# Largest factors of size and of the ratio of width to height, largest rotation, and largest shift
# as a share of half the image.
_MAX_ZOOM, _MAX_STRETCH, _MAX_ROTATION, _MAX_SHIFT = 1.25, 1.15, math.radians(15), 0.15
# Share of the images that are warped: the other images keep the noise that resampling smooths.
_WARPED_SHARE = 0.75
# Standard deviation of a channel's factor, and of its offset in standard deviations of the images.
_COLOUR_DEVIATION = 0.2
# Share of the images that are mixed with a second image, and the largest weight of that image.
_MIXED_SHARE, _MAX_MIXING_WEIGHT = 0.5, 0.3


@torch.no_grad()
def fresh(context: BlockContext, index: Tensor, count: int) -> BlockContext:
    """The same block on images augmented from some of its images.

    Args:
        context: context of the whole network.
        index: indices of the images to augment, ``(n,)``.
        count: number of images to make, all held in memory.
    """
    inputs, float_outputs = ActivationStore(count), ActivationStore(count)
    sources = index[_sources(len(index), count)]
    for chunk in chunks(count):
        images = context.quantized_inputs.get(sources[chunk], torch.device("cpu"))
        new_images = {name: augmented(value) for name, value in images.items()}
        inputs.put(chunk.start, new_images)
        on_device = {name: value.to(context.device) for name, value in new_images.items()}
        float_outputs.put(chunk.start, float_targets(context, on_device))
    return replace(
        context,
        float_inputs=inputs,
        quantized_inputs=inputs,
        float_outputs=float_outputs,
        count=count,
    )


def augmented_copies(images: Tensor, count: int) -> Tensor:
    """``count`` images augmented from ``(B, …)``, with torch's generator of the CPU."""
    sources = _sources(len(images), count)
    return torch.cat([augmented(images[sources[chunk]]) for chunk in chunks(count)])


def made_in_folds(images: Tensor, count: int, folds: int) -> list[Tensor]:
    """Divides images into folds, and adds ``count`` images augmented within their fold.

    In this way weights that are fitted to an image are not tested on an augmented copy of it.

    Args:
        images: ``(B, …)`` on the CPU, B at least ``folds``.
        count: number of images to make, in all folds together.
        folds: number of folds.

    Returns:
        For each fold its images and their augmented copies, ``(n, …)``.
    """
    groups = []
    for fold, group in enumerate(images.tensor_split(folds)):
        copies = count // folds + (fold < count % folds)
        groups.append(torch.cat((group, augmented_copies(group, copies))) if copies else group)
    return groups


def _sources(images: int, count: int) -> Tensor:
    """Indices of ``count`` images to augment, every image equally often up to one."""
    # On the CPU: the indices are the same for every device.
    rounds = [torch.randperm(images) for _ in range(-(-count // images))]
    return torch.cat(rounds)[:count]


@torch.no_grad()
def float_targets(context: BlockContext, inputs: Values) -> Values:
    """The outputs of the float block."""
    # Some models change their input in place.
    copies = {name: value.clone() for name, value in inputs.items()}
    return tensors_of(context.block, context.teacher.run_block(context.block, copies))


def augmented(x: Tensor) -> Tensor:
    """Augments images, with torch's generator of the device.

    Args:
        x: ``(B, C, H, W)``; values of any other shape ``(B, …)`` are mixed only.

    Returns:
        Images of the same number, shape and type, each channel within its range in ``x``.
    """
    return _mixed(_recoloured(_warped(x)) if x.ndim == 4 else x)


def _spread(x: Tensor, *shape: int) -> Tensor:
    """Uniform numbers in [-1, 1] on the device of ``x``."""
    return torch.rand(shape, device=x.device) * 2 - 1


def _warped(x: Tensor) -> Tensor:
    """Rotates, stretches, scales and shifts most images; pixels beyond the border are mirrored."""
    count, ratio = len(x), x.shape[2] / x.shape[3]
    zoom, stretch = (limit ** _spread(x, count) for limit in (_MAX_ZOOM, _MAX_STRETCH))
    turn, shift = _MAX_ROTATION * _spread(x, count), _MAX_SHIFT * _spread(x, count, 2)
    across, down = zoom * stretch, zoom / stretch
    # Coordinates are shares of the half width and half height.
    rows = (
        torch.stack((across * turn.cos(), -across * ratio * turn.sin(), shift[:, 0]), 1),
        torch.stack((down / ratio * turn.sin(), down * turn.cos(), shift[:, 1]), 1),
    )
    grid = affine_grid(torch.stack(rows, 1).to(x.dtype), list(x.shape), align_corners=False)
    warped = grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    return torch.where(torch.rand(count, 1, 1, 1, device=x.device) < _WARPED_SHARE, warped, x)


def _recoloured(x: Tensor) -> Tensor:
    """Multiplies each channel of an image by a factor and adds an offset, within its range.

    Cameras give no values beyond the range of a channel, and some models do not accept such values.
    """
    shape = (2, *x.shape[:2], 1, 1)
    changes = _COLOUR_DEVIATION * torch.randn(shape, device=x.device, dtype=x.dtype)
    factor, offset = changes.unbind()
    low, high = x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)
    return (x * (1 + factor) + offset * x.std()).clamp(low, high)


def _mixed(x: Tensor) -> Tensor:
    """Mixes some of the images with a share of a second image (arXiv 1710.09412)."""
    shape = (len(x), *(1 for _ in x.shape[1:]))
    share = _MAX_MIXING_WEIGHT * torch.rand(shape, device=x.device, dtype=x.dtype)
    share = share * (torch.rand(shape, device=x.device) < _MIXED_SHARE)
    partner = x[torch.randperm(len(x), device=x.device)]
    return x + share * (partner - x)
