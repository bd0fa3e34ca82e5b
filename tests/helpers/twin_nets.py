"""Small nets with twin uniform quantizers, for the tests of the backends."""

from __future__ import annotations

from functools import cache

from torch import Tensor, nn
from torch.nn import functional

import fxquant
from fxquant import CompiledModel, Policy, Rule, TensorSpec, policies
from fxquant.quantizers import TwinUniformQuantizer
from fxquant.testing import Block, images, seeded, tokens

PRODUCERS = ("softmax", "gelu", "silu", "hardswish")


class ConvNet(nn.Module):
    """SiLU and hardswish before a depthwise, a pointwise and a patch convolution and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 12, 1)
        self.patch = nn.Conv2d(12, 16, 2, stride=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, 3, 8, 8)`` to ``(B, 5)``."""
        x = functional.silu(self.stem(x))
        x = functional.hardswish(self.depthwise(x))
        x = self.patch(functional.silu(self.point(x)))
        return self.head(functional.silu(x.flatten(2).transpose(1, 2))).mean(1)


class Pair(nn.Module):
    """A product of two activations that both take a twin quantizer, scaled."""

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(B, N, C)`` to ``(B, N, N)``."""
        y = functional.gelu(3 * x)
        return y @ x.softmax(-1).transpose(1, 2) * 0.3


def twins(bits: int, max_shift: int | None = None) -> Policy:
    """Twin quantizers behind every producer that has two regions, min-max ones elsewhere."""
    spec = TensorSpec(bits=bits, scheme="twin_uniform", max_shift=max_shift)
    rules = [Rule(fed_by=name, spec=spec, optional=True) for name in PRODUCERS]
    return policies.minmax(8, bits).with_rules(*rules)


NETS = {"block": (Block, tokens), "conv": (ConvNet, images), "pair": (Pair, tokens)}


@cache
def compiled(net: str, bits: int, max_shift: int | None) -> CompiledModel:
    """Compiled on six inputs; not to be changed."""
    build, data = NETS[net]
    return fxquant.compile(seeded(build()), [data(6)], twins(bits, max_shift))


def found(model: CompiledModel) -> dict[str, TwinUniformQuantizer]:
    """The twin quantizers by name."""
    modules = model.graph_module.named_modules()
    return {name: m for name, m in modules if isinstance(m, TwinUniformQuantizer)}
