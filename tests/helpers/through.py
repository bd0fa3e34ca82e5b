"""A net that gives what its one quantizer gives, for tests of what a backend makes of that."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import fxquant
from fxquant import Rule, TensorSpec, policies
from fxquant.quantizers import Quantizer, UniformQuantizer


class Through(nn.Module):
    """A product with one, whose output is therefore its quantized input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, 1)`` to the same."""
        return functional.linear(x, self.weight)


@cache
def _compiled(weight_bits: int | None) -> fx.GraphModule:
    rule = Rule(arg="weight", spec=weight_bits and TensorSpec(bits=weight_bits, symmetric=True))
    policy = policies.minmax(8, 8).with_rules(rule)
    gm = fxquant.compile(Through().eval(), [torch.rand(2, 3, 1)], policy).graph_module
    if weight_bits:
        one, zero = torch.ones(()), torch.zeros(())
        unit = UniformQuantizer(one, zero, bits=weight_bits, signed=True, axis=None)
        gm.set_submodule("quant.linear__weight", unit)
    return gm


def through(quantizer: Quantizer, weight_bits: int | None = None) -> fx.GraphModule:
    """A graph with this quantizer at its input, not shared; the weight is float or quantized."""
    gm = copy.deepcopy(_compiled(weight_bits))
    gm.set_submodule("quant.linear__input", quantizer)
    return gm


def with_neighbours(borders: Tensor) -> Tensor:
    """Values ``(n,)`` and their neighbours in float32, as the net takes them: ``(1, 3n, 1)``."""
    infinity = torch.tensor(torch.inf)
    both = borders.nextafter(infinity), borders.nextafter(-infinity)
    return torch.cat([borders, *both]).view(1, -1, 1)
