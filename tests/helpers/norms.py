"""Norms read by linears, and helpers, for tests of what is folded out of a norm."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxquant.smoothing.fold_sites import Site, norm_sites
from fxquant.testing import DIM

Read = Callable[["Norm", Tensor], object]


class Norm(nn.Module):
    """A norm, two linears, and what is done with them."""

    def __init__(self, read: Read, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.read, self.norm = read, norm or nn.LayerNorm(DIM)
        self.one, self.two = nn.Linear(DIM, 4), nn.Linear(DIM, 4, bias=False)
        self.own = nn.Parameter(torch.empty(4, DIM))

    def forward(self, x: Tensor) -> object:
        return self.read(self, self.norm(x))


def both(m: Norm, y: Tensor) -> Tensor:
    return m.one(y) * m.two(y)


def padded(m: Norm, y: Tensor) -> Tensor:
    return m.one(F.pad(y, (0, 0, 1, 2)))


def site_of(gm: fx.GraphModule) -> Site:
    ((_, site),) = norm_sites(gm)
    assert isinstance(site, Site), site
    return site


def linear_inputs(gm: fx.GraphModule, x: Tensor) -> list[Tensor]:
    """What each linear of the graph reads."""
    seen: list[Tensor] = []

    class Reader(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            if n.target is torch.ops.aten.linear.default:
                seen.append(self.fetch_args_kwargs_from_env(n)[0][0].detach())
            return super().run_node(n)

    Reader(gm).run(x)
    return seen
