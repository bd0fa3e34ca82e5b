"""What a convolution multiplies at each position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from fxquant.graph.nodes import arguments


def patches(x: Tensor, node: fx.Node, weight: torch.Size) -> Tensor:
    """What a convolution multiplies at each position, a view but for the padding.

    Args:
        x: its input, ``(B, C, *spatial)``.
        node: the convolution.
        weight: shape of its weight, ``(out, in / groups, *kernel)``.

    Returns:
        ``(B, *spatial', C, *kernel)``, spatial' being those of the output.
    """
    given, kernel = arguments(node), weight[2:]
    axes = len(kernel)
    for axis, taps in enumerate(kernel):
        dilation = given["dilation"][axis % len(given["dilation"])]
        stride = given["stride"][axis % len(given["stride"])]
        span = dilation * (taps - 1)
        before, after = _pads(given["padding"], axis, span)
        # Spatial axes still to come and taps already opened stand behind this one.
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
