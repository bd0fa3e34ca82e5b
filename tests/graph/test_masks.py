"""Attention masks of minus infinity, where additions and softmax are quantized as well."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxquant
from fxquant import policies
from fxquant.graph.capture import capture
from fxquant.graph.masks import masked
from fxquant.testing import DIM, TOKENS, images, relative_error, tokens

FULL = policies.w8a8(full=True)
Mask = Any


def later(value: float) -> Tensor:
    """``value`` where a token would see a later one, else 0."""
    return torch.full((TOKENS, TOKENS), value).triu(1)


class Attention(nn.Module):
    """Scores masked by a function of scores and a mask of booleans, true where hidden."""

    def __init__(self, mask: Mask, value: float = -math.inf) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mask, self.value = mask, value
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.proj = nn.Linear(DIM, DIM)
        self.register_buffer("hidden", later(1).bool())
        self.register_buffer("added", later(value))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.mask == "causal":
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.mask == "fused":
            y = functional.scaled_dot_product_attention(q, k, v, ~self.hidden)
        else:
            y = self.mask(self, q @ k.mT / 2).softmax(-1) @ v
        return x + self.proj(y)


MASKS: dict[str, Mask] = {
    "causal": "causal",
    "fused": "fused",
    "a buffer": lambda m, scores: scores + m.added,
    "made in forward": lambda m, scores: scores + later(m.value),
    "filled": lambda m, scores: scores.masked_fill(m.hidden, m.value),
    "chosen": lambda m, scores: torch.where(m.hidden, m.value, scores),
    "behind moves": lambda m, scores: (
        scores + m.added[None, :, :, None].expand(2, -1, -1, 1)[0, ..., 0]
    ),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_what_may_be_minus_infinity_is_left_float_and_says_so(mask: Mask, tmp_path: Path) -> None:
    model = Attention(mask).eval()
    qm = fxquant.compile(model, [tokens(16)], FULL)
    left = {n.site for n in qm.report.notes if "may hold minus infinity" in n.reason}
    assert "softmax__input" in left
    assert len(left) == (1 if mask in (MASKS["filled"], MASKS["chosen"]) else 3)
    assert {"add__lhs", "add__rhs"} <= {e.edge for e in qm.plan if e.spec} | left
    assert relative_error(qm(tokens(16)), model(tokens(16))) < 0.02
    qm.export_onnx(tmp_path / "model.onnx")  # which checks onnxruntime against it
    assert relative_error(qm.lower("integer")(tokens(16)), qm(tokens(16))) < 1e-4


@pytest.mark.parametrize("value", [-100.0, -1e4])
@pytest.mark.parametrize("name", ["a buffer", "made in forward"])
def test_masks_of_finite_numbers_are_quantized(name: str, value: float) -> None:
    model = Attention(MASKS[name], value).eval()
    qm = fxquant.compile(model, [tokens(16)], FULL)
    assert qm.report.notes == ()
    assert relative_error(qm(tokens(16)), model(tokens(16))) < 0.02
    assert relative_error(qm.lower("integer", integer_only=True)(tokens(16)), qm(tokens(16))) < 0.01


@pytest.mark.parametrize(
    ("policy", "scheme"),
    [(policies.ptq4vit(4, 4), "twin_uniform"), (policies.aiqvit(4, 4), "dynamic_focusing")],
    ids=["ptq4vit", "aiqvit"],
)
def test_a_mask_that_the_images_make_keeps_the_quantizer_behind_softmax(
    policy: fxquant.Policy, scheme: str, tmp_path: Path
) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
            )
            seen = (x[..., 0] > -0.5)[:, None, None]
            return functional.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2)

    if policy.reconstruction is not None:
        policy = replace(policy, reconstruction=None)
    qm = fxquant.compile(Padded().eval(), [tokens(16)], policy)
    (edge,) = (entry for entry in qm.plan if entry.fed_by == "softmax")
    assert edge.spec is not None and edge.spec.scheme == scheme
    qm.export_onnx(tmp_path / "model.onnx")  # which checks onnxruntime against it
    assert relative_error(qm.lower("integer")(tokens(16)), qm(tokens(16))) < 1e-4


def test_what_pads_a_pool_does_not_leave_the_rest_float() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = nn.Conv2d(3, 4, 2), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = functional.pad(self.one(x), (1, 1, 1, 1), value=-math.inf)
            y = functional.max_pool2d(y, 3, 2)
            return self.two((y.relu() + y).mean((2, 3)))

    qm = fxquant.compile(Pooled().eval(), [images(8, 8)], FULL)
    assert not [note for note in qm.report.notes if "minus infinity" in note.reason]
    assert {"relu__input", "add__lhs", "add__rhs"} <= {e.edge for e in qm.plan if e.spec}


def test_rotary_embeddings_of_complex_numbers_compile() -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
            angles = torch.arange(TOKENS)[:, None] * torch.linspace(0.1, 1, DIM // 2)
            self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

        def forward(self, x: Tensor) -> Tensor:
            pairs = torch.view_as_complex(self.one(x).unflatten(-1, (-1, 2)).contiguous())
            return self.two(torch.view_as_real(pairs * self.turns).flatten(2))

    model = Rotary().eval()
    for policy in (policies.w8a8(), FULL):
        qm = fxquant.compile(model, [tokens(16)], policy)
        assert relative_error(qm(tokens(16)), model(tokens(16))) < 0.02


def test_products_softmax_and_clamps_end_the_way() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("added", later(-math.inf))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            scores = x @ x.mT + self.added
            return scores.clamp(min=-5) + 1, scores.softmax(-1) + 1, scores.exp() + 1, scores - 1

    gm = capture(Net().eval(), tokens())
    found = {node.name for node in masked(gm)}
    (outputs,) = gm.graph.output_node().args
    assert [node.name in found for node in outputs] == [False, False, False, True]
