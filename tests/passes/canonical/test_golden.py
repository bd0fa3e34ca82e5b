"""Graphs before and after each canonical pass, as texts to read and to compare with.

The texts lie in ``tests/data/golden/canonical``, a file for each pass. No test writes them: after a
change that is meant, run ``python -m tests.passes.canonical.test_golden`` at the repository's root,
and look through the differences before committing them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxquant.graph.capture import capture
from fxquant.passes import NameNodes, PassResult, run_passes
from fxquant.passes.canonical.canonicalize import CANONICAL
from fxquant.testing import (
    DIM,
    TOKENS,
    ConvNorm,
    Einsum,
    FusedAttention,
    PackedAttention,
    Products,
    images,
    seeded,
    tokens,
)
from tests.helpers.graph_text import graph_text

FOLDER = Path(__file__).parents[2] / "data" / "golden" / "canonical"


class Moves(nn.Module):
    """Operations that only move values, by several names each."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.mT.swapaxes(0, 1).movedim(0, 1)
        return torch.concat([y.narrow(2, 1, 3), y[..., :2]], -1)


class NoOps(nn.Module):
    """Operations that compute nothing, and a view of the size of another tensor."""

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.dropout(x.transpose(1, 2).contiguous(), 0.5, self.training)
        return y.view(-1, DIM * TOKENS).to(x.dtype).view_as(x).relu()


class BiasTable(nn.Module):
    """Swin's relative position bias: entries of a table at fixed positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(4, DIM))
        self.register_buffer("position", torch.arange(TOKENS) % 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[self.position].unsqueeze(0)


class ScaledQueries(nn.Module):
    """Attention scores of queries and keys that are scaled before the product."""

    def forward(self, x: Tensor) -> Tensor:
        return (0.5 * x) @ (x / 4.0).transpose(1, 2)


class Mlp(nn.Module):
    """Two linears with an activation function between them, and a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.mlp(x)
        return y


# Name of a pass -> the model that shows it, and its input.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "CanonicalizeDataMovement": (Moves, tokens),
    "DropNoOps": (NoOps, tokens),
    "SplitAttention": (FusedAttention, tokens),
    "OpenEinsum": (Einsum, tokens),
    "FoldConstants": (BiasTable, tokens),
    "ToLinear": (Products, tokens),
    "FoldBatchNorm": (ConvNorm, images),
    "ScaleAfterMatmul": (ScaledQueries, tokens),
    "SplitProjections": (PackedAttention, tokens),
    "NameNodes": (Mlp, tokens),
}
PASSES = [type(item).__name__ for item in CANONICAL]


def golden_text(name: str) -> str:
    """The graph before and after a pass, the passes in front of it having run."""
    model, data = MODELS[name]
    place, names = PASSES.index(name), name == NameNodes.__name__
    gm = capture(seeded(model()), data())
    run_passes(gm, CANONICAL[:place])
    before = graph_text(gm, names=names)
    result: PassResult = run_passes(gm, CANONICAL[place : place + 1])[name]
    after = graph_text(gm, names=names)
    return f"before\n{before}\nafter {name}, {result.changed} changed\n{after}"


def test_every_canonical_pass_is_shown() -> None:
    assert list(MODELS) == PASSES
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(PASSES)


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_writes_the_graph_that_its_text_shows(name: str) -> None:
    assert golden_text(name) == (FOLDER / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PASSES)
def test_a_text_shows_that_its_pass_does_something(name: str) -> None:
    before, after = (FOLDER / f"{name}.txt").read_text(encoding="utf-8").split("\n\n")
    assert before.splitlines()[1:] != after.splitlines()[1:]


def regenerate() -> None:
    """Writes all texts again, from the passes as they are now."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in PASSES:
        (FOLDER / f"{name}.txt").write_text(golden_text(name), encoding="utf-8")


if __name__ == "__main__":
    regenerate()
