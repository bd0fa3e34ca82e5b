"""A network of every operation that runs integer-only, and a comparison of its codes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import fxquant
from fxquant import CompiledModel, Policy, policies
from tests.helpers.ties import IntegerQuantizer

# Farther from a tie than this, in steps of 8 bits, no code may differ. Accumulators and multipliers
# are exact to 2^-20 of a value, the float32 arithmetic of the simulation to a little less.
NEAR_TIE = 2e-3


class Windows(nn.Module):
    """What Swin and ViT do between products, at the smallest sizes: 4 x 4 patches of width 8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(2, 9, 9))
        # The last window holds patches of two sides, which must not see each other.
        mask = torch.zeros(4, 9, 9)
        mask[3, :4, 4:] = mask[3, 4:, :4] = -100.0
        self.register_buffer("mask", mask)
        self.proj, self.gamma = nn.Linear(8, 8), nn.Parameter(torch.randn(8))
        self.norm2, self.fc1, self.fc2 = nn.RMSNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.cls, self.position = (nn.Parameter(torch.randn(1, n, 8)) for n in (1, 17))
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).permute(0, 2, 3, 1)
        b = x.shape[0]
        # Shift by one, pad 4 x 4 to 6 x 6, cut into four windows of nine.
        y = functional.pad(torch.roll(self.norm(x), (-1, -1), (1, 2)), (0, 0, 1, 1, 1, 1))
        y = y.view(b, 2, 3, 2, 3, 8).permute(0, 1, 3, 2, 4, 5).reshape(4 * b, 9, 8)
        q, k, v = (f(y).view(-1, 9, 2, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) / 2 + self.bias
        scores = scores.view(b, 4, 2, 9, 9) + self.mask[None, :, None]
        y = (scores.view(-1, 2, 9, 9).softmax(-1) @ v).transpose(1, 2).reshape(-1, 9, 8)
        y = self.proj(y).view(b, 2, 2, 3, 3, 8).permute(0, 1, 3, 2, 4, 5).reshape(b, 6, 6, 8)
        x = (x + y[:, 1:5, 1:5] * self.gamma).flatten(1, 2)
        x = torch.cat([self.cls.expand(b, -1, -1), x], 1) + self.position
        x = x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))
        return self.head(x[:, 1:].mean(1))


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count)) + 0.5


def compiled(policy: Policy, model: nn.Module | None = None) -> CompiledModel:
    torch.manual_seed(0)
    return fxquant.compile((model or Windows()).eval(), [images(16)], policy)


@cache
def full() -> CompiledModel:
    """For tests that change nothing in it."""
    return compiled(policies.w8a8(full=True))


def assert_same_codes(qm: CompiledModel, lowered: fx.GraphModule, x: Tensor) -> None:
    """Checks that codes differ from the simulation's by one, at ties, and hardly ever.

    Each quantizer of the simulation is given the values that the integer codes before it stand
    for, so that a difference is its own.
    """
    names, values = lowered.meta["codes"], {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            values[n.name] = super().run_node(n)
            return values[n.name]

    seen = []

    def force(name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            theirs = values[names[name]].to(torch.float32)
            own = module.quantize(args[0])
            wrong = theirs != own
            seen.append(name)
            if bool(wrong.any()):
                gap = (module.dequantize(theirs) - args[0]).abs() - (output - args[0]).abs()
                step = (module.dequantize(theirs) - output).abs()[wrong].max()
                near = NEAR_TIE * 2 ** max(module.bits - 8, 0)
                assert float(gap[wrong].abs().max() / step) < near, f"{name}: no tie"
                assert int(wrong.sum()) <= max(2, near * wrong.numel()), f"{name}: {wrong.sum()}"
            return module.dequantize(theirs)

        return hook

    handles = [
        module.register_forward_hook(force(name))
        for name, module in qm.graph_module.named_modules()
        if isinstance(module, IntegerQuantizer)
    ]
    try:
        with torch.no_grad():
            out = Keep(lowered).run(x)
            expected = qm(x)
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(seen) == sorted(names)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


class Ends(nn.Module):
    """A linear, what is asked for, a relu and a linear."""

    def __init__(self, function) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.one, self.two, self.function = nn.Linear(16, 16), nn.Linear(16, 16), function

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.function(self.one(x)).relu())
