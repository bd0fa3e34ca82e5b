"""The patch of its input that a convolution multiplies at each position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from fxquant.graph.nodes import arguments


def patches(x: Tensor, node: fx.Node, weight: torch.Size) -> Tensor:
    """The patch of ``x`` that a convolution multiplies at each position; a view without padding.

    Args:
        x: input of the convolution, ``(B, C, *spatial)``.
        node: the convolution.
        weight: shape of the convolution's weight, ``(out, in / groups, *kernel)``.

    Returns:
        ``(B, *spatial', C, *kernel)`` with the spatial sizes of the output.
    """
    options, kernel = arguments(node), weight[2:]
    axes = len(kernel)
    for axis, taps in enumerate(kernel):
        dilation = options["dilation"][axis % len(options["dilation"])]
        stride = options["stride"][axis % len(options["stride"])]
        span = dilation * (taps - 1)
        before, after = _pads(options["padding"], axis, span)
        # Spatial axes that follow, and kernel axes of the earlier ones, stand behind this axis.
        amounts = [0, 0] * (axes - 1) + [before, after]
        x = functional.pad(x, amounts) if before or after else x
        x = x.unfold(2 + axis, span + 1, stride)[..., ::dilation]
    return x.movedim(1, 1 + axes)


def _pads(padding: Any, axis: int, span: int) -> tuple[int, int]:
    if padding == "same":
        return span // 2, span - span // 2
    if padding == "valid":
        return 0, 0
    amount = int(padding[axis % len(padding)])
    return amount, amount
