"""SplitAttention: every form of fused attention is opened, masks included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant import testing
from fxquant.graph.capture import capture
from fxquant.passes import DropNoOps, FoldConstants, SplitAttention, run_passes
from fxquant.testing import TOKENS, FusedAttention, assert_pass, op_names, seeded, tokens

OPEN = ["matmul", "mul", "softmax", "matmul"]


def hidden_mask() -> Tensor:
    return torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(1)


@pytest.mark.parametrize(
    ("attention", "added"),
    [
        (FusedAttention(), 0),
        (FusedAttention(scale=0.3), 0),
        (FusedAttention(torch.randn(TOKENS, TOKENS)), 1),
        (FusedAttention(hidden_mask()), 1),
        (FusedAttention(is_causal=True), 1),
        (FusedAttention(kv_heads=1, enable_gqa=True), 0),
        (FusedAttention(hidden_mask(), kv_heads=1, enable_gqa=True, scale=2.0), 1),
    ],
    ids=["plain", "scale", "float mask", "bool mask", "causal", "gqa", "all"],
)
def test_fused_attention_is_opened(attention: nn.Module, added: int) -> None:
    gm, _ = assert_pass(attention.eval(), tokens(), SplitAttention(), changed=1)
    core = ("matmul", "mul", "softmax")
    assert [name for name in op_names(gm) if name in core] == OPEN
    assert "scaled_dot_product_attention" not in op_names(gm)
    after = op_names(gm)[op_names(gm).index("mul") :]
    assert after[: after.index("softmax")].count("add") == added


class MaskedAttention(nn.Module):
    """Attention under a mask that ``function(x, weight)`` makes."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(TOKENS, TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        y = x[:, None]
        return F.scaled_dot_product_attention(y, y, y, self.function(x, self.weight))[:, 0]


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))


@pytest.mark.parametrize("form", [Tensor.clone, additive], ids=["bool", "float"])
def test_a_row_that_the_mask_hides_completely_is_zero_as_in_torch(form: Any) -> None:
    mask = hidden_mask()
    mask[2] = False
    attention = MaskedAttention(lambda x, w: form(mask)).eval()
    gm, _ = assert_pass(attention, tokens(), SplitAttention(), changed=1)
    assert bool(torch.isfinite(gm(tokens())).all())
    assert bool((gm(tokens())[:, 2] == 0).all())


def test_a_computed_mask_that_hides_rows_gives_zero_too() -> None:
    def padding(x: Tensor, w: Tensor) -> Tensor:
        seen = torch.where(x[..., :1] > 0, 0.0, float("-inf"))
        return (w.exp() + seen)[:, None]

    gm, _ = assert_pass(MaskedAttention(padding).eval(), tokens(), SplitAttention(), changed=1)
    assert bool(torch.isfinite(gm(tokens())).all())
    assert "masked_fill" in op_names(gm)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: w,
        lambda x, w: torch.full((TOKENS, TOKENS), float("-inf")).triu(1),
        lambda x, w: (w + hidden_mask()).expand(x.shape[0], 1, -1, -1),
    ],
    ids=["parameter", "made in forward", "as many as images"],
)
def test_a_mask_that_hides_no_row_adds_nothing(function: Any) -> None:
    gm, _ = assert_pass(MaskedAttention(function).eval(), tokens(), SplitAttention(), changed=1)
    assert "masked_fill" not in op_names(gm)


def test_a_causal_mask_is_made_once() -> None:
    gm, _ = assert_pass(
        FusedAttention(is_causal=True).eval(),
        tokens(),
        FoldConstants(),
        before=[SplitAttention()],
        changed=3,
    )
    after = op_names(gm)[op_names(gm).index("matmul") :]
    assert after[:4] == ["matmul", "mul", "add", "softmax"]


def test_a_causal_mask_over_the_batch_is_made_at_run_time() -> None:
    class OverImages(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.transpose(0, 1)
            return F.scaled_dot_product_attention(y, y, y, is_causal=True).transpose(0, 1)

    gm, _ = assert_pass(OverImages().eval(), tokens(), SplitAttention(), changed=1)
    assert "new_ones" in op_names(gm)


def test_multihead_attention_of_torch_is_opened() -> None:
    gm, _ = assert_pass(
        seeded(testing.TorchAttention()),
        tokens(),
        SplitAttention(),
        changed=1,
        before=[DropNoOps()],
    )
    assert op_names(gm).count("matmul") == 2


def test_opened_attention_belongs_to_the_module_it_was_in() -> None:
    gm = capture(seeded(testing.Block()), tokens())
    run_passes(gm, [SplitAttention()])
    stacks = [n.meta["nn_module_stack"] for n in gm.graph.nodes if "softmax" in n.name]
    assert [list(stack.values())[-1][0] for stack in stacks] == ["attn"]
