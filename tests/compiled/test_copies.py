"""Copies of a compiled model, and what torch.save makes of it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fxquant.testing import tokens
from tests.helpers import compiled
from tests.helpers.round_trip import assert_round_trip


def through_torch_save(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, through_torch_save])
def test_copies_do_all_that_the_model_does(again: Callable[[Any], Any], tmp_path: Path) -> None:
    model = compiled.block()
    copied = again(model)
    assert copied.report == model.report and copied.policy == model.policy
    assert_round_trip(copied, tokens(4), tmp_path / "saved")
    assert copied.export_onnx(tmp_path / "model.onnx").unfused == ()
    lowered = model.lower("integer")
    assert torch.equal(again(lowered)(tokens(4)), copied.lower("integer")(tokens(4)))
    before = model(tokens(4))
    with torch.no_grad():
        for buffer in copied.buffers():
            buffer.mul_(2)
    assert torch.equal(model(tokens(4)), before)
    assert not torch.equal(copied(tokens(4)), before)
