"""Checks that a saved and loaded model is the same."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import fxquant


def assert_round_trip(model: fxquant.CompiledModel, x: Tensor, folder: Path) -> None:
    model.save(folder)
    again = fxquant.load(folder)
    for batch in (x, x[:1]):
        one, other = again(batch), model(batch)
        leaves = [torch.utils._pytree.tree_leaves(y) for y in (one, other)]
        assert type(one) is type(other) and len(leaves[0]) == len(leaves[1])
        assert all(torch.equal(a, b) for a, b in zip(*leaves, strict=True))
    assert again.plan == model.plan and again.report == model.report
    assert again.policy == model.policy and again.image_shape == model.image_shape
