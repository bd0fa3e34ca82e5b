"""Towers of two blocks, quantized to few bits and reconstructed."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from fxquant.config.recovery import Reconstruction
from fxquant.config.spec import Granularity, TensorSpec
from fxquant.config.vocabulary import Arg
from fxquant.passes import PassResult, Reconstruct, run_passes
from fxquant.policies.policy import Rule
from fxquant.reconstruction.blockwise import BlockwiseRunner
from fxquant.reconstruction.image_split import split_images
from fxquant.testing import DIM, Block, tokens
from tests.helpers import stages


class Stack(nn.Module):
    """Two transformer blocks between a projection and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(DIM, DIM)
        self.one, self.two = Block(), Block()
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.two(self.one(self.stem(x)))).mean(1))


THREE = TensorSpec(bits=3, symmetric=True, granularity=Granularity.CHANNEL)


FIVE = TensorSpec(bits=5)


BATCH = tokens(24)


SHORT = {"iterations": 25, "batch": 12, "weight_rate": 2e-2, "drop": 0.0}


class Tower(Stack):
    """A prediction for each token."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.two(self.one(self.stem(x)))))


def frozen(model: nn.Module | None = None) -> fx.GraphModule:
    """A seeded model, a Tower where none is named, in stage FROZEN; free to be changed."""
    return copy.deepcopy(_tower()) if model is None else _frozen(model)


@cache
def _tower() -> fx.GraphModule:
    return _frozen(Tower())


def _frozen(model: nn.Module) -> fx.GraphModule:
    rules = Rule(arg=Arg.WEIGHT, spec=THREE), Rule(spec=FIVE)
    return stages.frozen(*rules, model=model, data=[BATCH])


def reconstruct(gm: fx.GraphModule, cache: Path | None = None, **options: Any) -> PassResult:
    chosen = Reconstruction(**{**SHORT, **options})
    split = split_images(len(BATCH), chosen)
    item = Reconstruct(BlockwiseRunner(gm, BATCH), chosen, split, cache)
    return run_passes(gm, [item])["Reconstruct"]
