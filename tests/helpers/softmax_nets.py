"""Small nets whose softmax has a scheme for values from zero up, for the tests of these."""

from __future__ import annotations

from functools import cache

from torch import Tensor, nn

import fxquant
from fxquant import CompiledModel, Policy, Rule, TensorSpec, policies
from fxquant.config.spec import Scheme
from fxquant.quantizers import DynamicFocusingQuantizer, LogQuantizer, Quantizer
from fxquant.testing import DIM, Block, seeded, tokens

SCHEMES = [scheme for scheme in Scheme if scheme.limits.is_one_sided]


class Sharp(nn.Module):
    """Attention, sharp or nearly even, and a linear that reads a softmax."""

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.sharpness, self.fc = sharpness, nn.Linear(DIM, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(B, N, C)`` to ``(B, N, 5)``."""
        attention = (self.sharpness * x @ x.transpose(1, 2)).softmax(-1)
        return self.fc((attention @ x).softmax(-1))


NETS = {"block": Block, "sharp": lambda: Sharp(1.0), "even": lambda: Sharp(0.003)}


def policy(scheme: Scheme, bits: int, observer: str = "mse") -> Policy:
    spec = TensorSpec(bits=bits, scheme=scheme, observer=observer)
    return policies.minmax(8, 8).with_rules(Rule(fed_by="softmax", spec=spec))


@cache
def compiled(net: str, scheme: Scheme, bits: int) -> CompiledModel:
    """Compiled on six inputs; not to be changed."""
    return fxquant.compile(seeded(NETS[net]()), [tokens(6)], policy(scheme, bits))


def found(model: CompiledModel) -> dict[str, Quantizer]:
    """The quantizers of these schemes by name."""
    kinds = DynamicFocusingQuantizer | LogQuantizer
    return {n: m for n, m in model.graph_module.named_modules() if isinstance(m, kinds)}
