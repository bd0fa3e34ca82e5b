"""Models that once came out wrong, or failed with a misleading message."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import BatchError, CaptureError, PolicyError
from fxquant.testing import DIM, TOKENS, relative_error, seeded, tokens
from tests.helpers.refusals import refused


class Regions(nn.Module):
    """no_grad and autocast regions, as rotary embeddings and norms have them."""

    def __init__(self, *, autocast: bool) -> None:
        super().__init__()
        self.fc, self.autocast = nn.Linear(DIM, DIM), autocast

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=self.autocast):
            y = self.fc(x)
        with torch.no_grad():
            return self.fc(y * 2)


def test_regions_are_inlined() -> None:
    model = seeded(Regions(autocast=False))
    compiled = fxquant.compile(model, [tokens()], "w8a8")
    assert len(compiled.plan) == 4
    assert relative_error(compiled(tokens()), model(tokens())) < 0.05


def test_autocast_inside_the_model_is_refused() -> None:
    with refused(CaptureError, "autocast is on inside the model", edge=""):
        fxquant.compile(seeded(Regions(autocast=True)), [tokens()], "w8a8")


class Masked(nn.Module):
    """Attention with a mask of infinities as a buffer, as CLIP has it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((TOKENS, TOKENS), float("-inf")).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.transpose(1, 2) + self.mask).softmax(-1) @ x


def test_a_buffer_may_hold_infinity(tmp_path: Path) -> None:
    model = seeded(Masked())
    compiled = fxquant.compile(model, [tokens()], "w8a8")
    assert relative_error(compiled(tokens()), model(tokens())) < 0.05
    assert compiled.export_onnx(tmp_path / "m.onnx").unfused == ()


def test_hooks_left_out_are_reported() -> None:
    model = seeded(nn.Sequential(nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)))
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    report = fxquant.compile(model, [tokens()], "w8a8").report
    assert [(note.step, note.site) for note in report.notes] == [("capture", "1")]
    assert "hooks are not in the compiled model" in str(report)


def test_products_without_a_quantized_form_are_counted() -> None:
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.ConvTranspose1d(TOKENS, TOKENS, 1))
    report = fxquant.compile(seeded(model), [tokens()], "w8a8").report
    assert [site for site, _ in report.unsupported] == ["conv_transpose1d"]
    assert "1 product has no quantized form" in report.summary()
    assert "conv_transpose1d has no quantized form yet" in str(report)


class Counting(nn.Module):
    """Changes a buffer in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(DIM, DIM)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.fc(x) + self.calls


def test_a_model_that_changes_itself_is_named_as_such() -> None:
    with pytest.raises(CaptureError, match="changes a buffer in eval mode"):
        fxquant.compile(seeded(Counting()), [tokens()], "w8a8")


def test_images_of_double_precision_are_refused() -> None:
    with refused(BatchError, got=torch.float64, expected=torch.float32):
        fxquant.compile(seeded(nn.Linear(DIM, DIM)), [tokens().double()], "w8a8")


def test_images_that_the_model_does_not_take_are_named_as_such() -> None:
    wrong = torch.randn(2, TOKENS, DIM + 1)
    with refused(BatchError, got=(2, 5, 9), expected=None):
        fxquant.compile(seeded(nn.Linear(DIM, DIM)), [wrong], "w8a8")


def test_a_model_of_double_precision_is_named_before_its_images() -> None:
    model = seeded(nn.Linear(DIM, DIM)).double()
    with refused(CaptureError, edge="weight", got=torch.float64, expected=torch.float32):
        fxquant.compile(model, [tokens().double()], "w8a8")


def test_a_model_wrapped_by_torch_compile_is_unwrapped() -> None:
    model = seeded(nn.Linear(DIM, DIM))
    compiled = fxquant.compile(torch.compile(model).eval(), [tokens()], "w8a8")
    assert relative_error(compiled(tokens()), model(tokens())) < 0.05


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("rules:\n  - spec:\n      bits: 8\n      bits: 4\n")
    with refused(PolicyError, "line 4: 'bits' is there twice", got="bits"):
        fxquant.compile(seeded(nn.Linear(DIM, DIM)), [tokens()], path)


def test_a_changed_preset_says_so() -> None:
    changed = fxquant.policies.w8a8().with_rules(fxquant.Rule(path="head", spec=None))
    assert changed.name == "w8a8 (changed)" and len(changed.rules) == 5
    assert changed.with_rules().name == changed.name
