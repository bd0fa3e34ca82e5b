"""Moves under one name each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import policies
from fxquant.backends.integer import float_operations
from fxquant.passes import CanonicalizeDataMovement
from fxquant.testing import DIM, assert_pass, op_names, tokens
from tests.helpers.functions import model

ORDERS = {
    "mT": lambda x: x.mT,
    "adjoint": lambda x: x.adjoint(),
    "T": lambda x: x[0].T,
    "swapaxes": lambda x: x.swapaxes(1, -1),
    "swapdims": lambda x: x.swapdims(0, 1),
    "moveaxis": lambda x: x.moveaxis(1, 2),
    "moveaxis of several": lambda x: x.moveaxis((0, 1), (1, -1)),
    "movedim": lambda x: x.movedim(-1, 0),
    "movedim of several": lambda x: x.movedim((2, 0), (0, 1)),
}


@pytest.mark.parametrize("move", ORDERS.values(), ids=ORDERS)
def test_every_order_of_axes_is_a_permute(move: Any) -> None:
    gm, _ = assert_pass(
        model(lambda x, w: move(x + w[0])), tokens(), CanonicalizeDataMovement(), changed=1
    )
    assert op_names(gm)[-1] == "permute"


@pytest.mark.parametrize(
    ("move", "name"),
    [
        (lambda x: x.narrow(1, 1, 3), "slice"),
        (lambda x: x.narrow(-1, -2, 2), "slice"),
        (lambda x: x.ravel(), "flatten"),
        (lambda x: torch.concat([x, x], 1), "cat"),
        (lambda x: torch.concatenate([x, x], -1), "cat"),
    ],
    ids=["narrow", "narrow from the end", "ravel", "concat", "concatenate"],
)
def test_other_moves_take_the_name_that_passes_know(move: Any, name: str) -> None:
    gm, _ = assert_pass(
        model(lambda x, w: move(x + w[0])), tokens(), CanonicalizeDataMovement(), changed=1
    )
    assert op_names(gm)[-1] == name


def test_a_part_whose_place_changes_with_the_batch_stays() -> None:
    gm, _ = assert_pass(
        model(lambda x, w: (x + w[0]).narrow(0, x.shape[0] - 1, 1)),
        tokens(),
        CanonicalizeDataMovement(),
        changed=0,
    )
    assert op_names(gm)[-1] == "narrow"


class Modern(nn.Module):
    """Attention with its axes moved by newer names."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(DIM), nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).moveaxis(2, 0)
        q, k, v = (part.swapaxes(1, 2) for part in y)
        y = (q @ k.mT / 2).softmax(-1) @ v
        return x + self.proj(y.swapdims(1, 2).flatten(2))


def test_a_network_of_them_runs_in_integers_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    qm = fxquant.compile(Modern().eval(), [tokens(16)], policies.w8a8(full=True))
    assert {e.fed_by for e in qm.plan if e.op == "matmul"} == {"linear", "softmax"}
    assert float_operations(qm.lower("integer", integer_only=True), tokens(2)) == []
    assert qm.export_onnx(tmp_path / "model.onnx").unfused == ()
