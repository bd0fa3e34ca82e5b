"""Exact convolution of integer codes in one, two or three dimensions.

A convolution becomes a product of patches with the weight. A float convolution might choose a
transform (Winograd, FFT), which would round; a product of patches does not. With one input channel
per group the patches would be as many times larger than the image as the kernel has taps, with no
benefit; such convolutions are summed tap by tap.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fxquant.backends.integer.kernels import Multiply, Operand, accumulator_dtype, affine_matmul


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Shape of a convolution; tuples have one entry for each spatial axis.

    Attributes:
        stride: step between outputs.
        padding: numbers of zeros before and after each axis.
        dilation: step between taps.
        groups: number of channel groups.
    """

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int


def convolve(
    x: Operand, weight: Operand, geometry: Geometry, multiply: Multiply = affine_matmul
) -> Tensor:
    """Exact ``conv(x.codes - x.zero_point, weight.codes - weight.zero_point)``.

    Args:
        x: codes ``(B, C, *spatial)``, zero_point ``()``.
        weight: codes ``(N, C / groups, *kernel)``, zero_point ``()`` or ``(N, 1, …)``.
        geometry: stride, padding, dilation and groups.
        multiply: exact product of patches with the weight.

    Returns:
        ``(B, N, *spatial')``, int32, or int64 where a sum could exceed int32.
    """
    x = x._replace(codes=_pad(x, geometry.padding))
    if geometry.groups > 1 and weight.codes.shape[1] == 1:
        return _by_taps(x, weight, geometry)
    return _by_patches(x, weight, geometry, multiply)


def _pad(x: Operand, padding: tuple[tuple[int, int], ...]) -> Tensor:
    """Pads the codes with the code that represents zero."""
    if not any(itertools.chain(*padding)):
        return x.codes
    # functional.pad starts at the last axis.
    amounts = [amount for pair in reversed(padding) for amount in pair]
    if x.zero_point is None:
        return functional.pad(x.codes, amounts)
    # Padding needs a plain number; reading the zero point as a number would break a compiled graph.
    padded = functional.pad(x.codes.to(torch.int32) - x.zero_point, amounts)
    return (padded + x.zero_point).to(x.codes.dtype)


def _by_patches(x: Operand, weight: Operand, geometry: Geometry, multiply: Multiply) -> Tensor:
    codes, kernel, groups = x.codes, weight.codes.shape[2:], geometry.groups
    steps = zip(kernel, geometry.stride, geometry.dilation, strict=True)
    for axis, (taps, stride, dilation) in enumerate(steps, start=2):
        codes = codes.unfold(axis, dilation * (taps - 1) + 1, stride)[..., ::dilation]
    spatial_axes, spatial = len(kernel), codes.shape[2 : 2 + len(kernel)]
    # (B, C, *out, *taps) -> (B, groups, out, C/groups * taps)
    codes = torch.unflatten(codes, 1, (groups, -1)).movedim(2, 2 + spatial_axes)
    codes = codes.flatten(2 + spatial_axes).flatten(2, 1 + spatial_axes)
    rows = torch.unflatten(weight.codes.flatten(1), 0, (groups, -1)).transpose(-1, -2)
    zero_point = weight.zero_point
    if zero_point is not None and zero_point.ndim:
        zero_point = zero_point.view(groups, 1, -1)
    if groups == 1:  # the int8 product needs two axes
        rows, zero_point = (
            rows[0],
            zero_point if zero_point is None or not zero_point.ndim else zero_point[0],
        )
    product = multiply(
        Operand(codes, x.zero_point, x.bound), Operand(rows, zero_point, weight.bound)
    )
    return product.transpose(-1, -2).flatten(1, 2).reshape(*product.shape[:1], -1, *spatial)


def _by_taps(x: Operand, weight: Operand, geometry: Geometry) -> Tensor:
    kernel, codes = weight.codes.shape[2:], weight.codes
    accumulator = accumulator_dtype(x.bound * weight.bound * kernel.numel())
    image = _integers(x, accumulator).repeat_interleave(codes.shape[0] // x.codes.shape[1], 1)
    taps = _integers(weight, accumulator)
    total: Tensor | None = None
    for tap in itertools.product(*map(range, kernel)):
        window = image
        for axis, position in enumerate(tap):
            window = _window(window, axis, position, kernel[axis], geometry)
        factor = taps[:, 0]
        for position in tap:
            factor = factor[:, position]
        tap_product = window * factor.view(-1, *[1] * len(kernel))
        total = tap_product if total is None else total + tap_product
    assert total is not None
    return total


def _window(image: Tensor, axis: int, tap: int, taps: int, geometry: Geometry) -> Tensor:
    """Entries of the image that one tap of the kernel reads along a spatial axis."""
    stride, dilation = geometry.stride[axis], geometry.dilation[axis]
    span = image.shape[axis + 2] - dilation * (taps - 1)
    return image.narrow(axis + 2, tap * dilation, span).unfold(axis + 2, 1, stride)[..., 0]


def _integers(operand: Operand, dtype: torch.dtype) -> Tensor:
    codes = operand.codes.to(dtype)
    return codes if operand.zero_point is None else codes - operand.zero_point.to(dtype)
