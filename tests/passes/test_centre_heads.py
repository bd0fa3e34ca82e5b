"""CentreHeads: channels of keys and values move around zero, the function stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxquant
from fxquant import testing
from fxquant.config.vocabulary import Stage
from fxquant.errors import PassError
from fxquant.passes import CentreHeads, PassResult, run_passes
from fxquant.passes.centre_heads import head_ranges, value_sites
from fxquant.policies.policy import Policy, Rule
from fxquant.rotation.key_sites import key_sites
from fxquant.testing import assert_same_function, op_names, relative_error, seeded, tokens
from tests.helpers.refusals import refused
from tests.helpers.residual import Attention, Expanded, points, residual
from tests.helpers.stages import EIGHT, annotated, canonical, reasons
from tests.helpers.zoo import FAMILIES, Family, run_on_family


def centred(model: nn.Module, x: Tensor, changed: int) -> tuple[fx.GraphModule, PassResult]:
    """A canonical graph after the pass, the function and the middles of channels checked."""
    gm = canonical(model, x, seed=False)
    operations = op_names(gm)
    result = run_passes(gm, [CentreHeads(head_ranges(gm, [x]))])["CentreHeads"]
    assert result.changed == changed and op_names(gm) == operations
    assert_same_function(gm, model, x)
    ranges = head_ranges(gm, [x])
    assert len(ranges) == changed
    for lo, hi in ranges.values():
        assert float((lo + hi).abs().max()) < 1e-5 * float((hi - lo).max())
    return gm, result


@settings(max_examples=12)
@given(head_width=st.integers(2, 8), heads=st.integers(1, 4), shift=st.floats(-5, 5))
def test_the_function_stays(head_width: int, heads: int, shift: float) -> None:
    model = residual(head_width * heads, heads, depth=1)
    with torch.no_grad():
        for linear in (model.attention[0].k, model.attention[0].v):
            linear.bias += shift
    centred(model, points(), 2)


@pytest.mark.parametrize("bias", [True, False])
def test_only_biases_change(bias: bool) -> None:
    attention = Attention(16, 4)
    if not bias:
        attention.k.bias = attention.v.bias = attention.proj.bias = None
    gm, _ = centred(seeded(attention), torch.randn(2, 5, 16), 2)
    weights = {name: value for name, value in gm.state_dict().items() if value.ndim > 1}
    exact = attention.state_dict()
    assert sorted(map(float, (w.sum() for w in weights.values()))) == sorted(
        map(float, (exact[f"{name}.weight"].sum() for name in ("q", "k", "v", "proj")))
    )


@pytest.mark.parametrize(
    "model", [testing.PackedAttention, testing.PerHeadAttention, testing.TorchAttention]
)
def test_any_packing_is_centred(model: type[nn.Module]) -> None:
    centred(seeded(model()), tokens(), 2)


# Linears of keys and of values of real networks, and refusals.
LINEARS = {
    "vit_tiny_patch16_224": (4, 0),
    "swin_tiny_patch4_window7_224": (8, 0),  # relative positions and masks are added to scores
    "swinv2_tiny_window8_256": (4, 4),  # keys are normalized
    "beit_base_patch16_224": (2, 0),
    "eva02_tiny_patch14_224": (1, 1),  # rotary embedding
    "pvt_v2_b0": (8, 0),
    "levit_128s": (5, 0),  # hard-swish between attention and projection
    "vit_small_patch14_dinov2": (2, 0),
    "torchvision swin": (8, 0),
    "torchvision maxvit": (8, 0),
}


class _OnRandomImages:
    """The pass, with ranges of random images of the graph's size."""

    requires: ClassVar[Stage] = Stage.FLOAT
    ensures: ClassVar[Stage] = Stage.FLOAT

    def run(self, gm: fx.GraphModule) -> PassResult:
        (image,) = (node for node in gm.graph.nodes if node.op == "placeholder")
        return CentreHeads(head_ranges(gm, [torch.randn(2, *image.meta["val"].shape[1:])])).run(gm)


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.name in LINEARS], ids=lambda family: family.name
)
def test_the_function_of_real_networks_stays(family: Family) -> None:
    result = run_on_family(family, _OnRandomImages())
    assert (result.changed, len(result.notes)) == LINEARS[family.name]


@pytest.mark.parametrize("bits", [4, 8])
def test_keys_far_from_zero_cost_nothing_any_more(bits: int) -> None:
    model, x = residual(16, 4, depth=1), points(32)
    with torch.no_grad():
        for linear in (model.attention[0].k, model.attention[0].v):
            linear.bias[::4] += 20
    attention = (Rule(op="matmul", arg="rhs", spec=replace(EIGHT, bits=bits, symmetric=True)),)
    plain = Policy(name="attention", rules=attention)
    errors = [
        relative_error(fxquant.compile(model, [x], replace(plain, centre_heads=on))(x), model(x))
        for on in (False, True)
    ]
    assert errors[1] < 0.2 * errors[0]


# Sites


class Scores(nn.Module):
    """Attention with any function from scores to attention."""

    def __init__(self, attend: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.q, self.k, self.v, self.proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = self.attend(q @ k.transpose(-2, -1)) @ v
        z: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return z


MASK = torch.ones(5, 5).triu(1).bool()
HEAD_SCALES = torch.tensor([0.3, 0.7]).view(2, 1, 1)
KEY_SCALES = torch.linspace(0.5, 1.5, 5)
STAYING: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda s: s.softmax(-1),
    "scale": lambda s: (s * 0.5).softmax(-1),
    "scale of each head": lambda s: (s * HEAD_SCALES).softmax(-1),
    "divided": lambda s: (s / 2.0).softmax(-1),
    "positions": lambda s: (s + KEY_SCALES).softmax(-1),
    "mask": lambda s: s.masked_fill(MASK, -torch.inf).softmax(-1),
    "large mask": lambda s: s.masked_fill(MASK, -1e9).softmax(-1),
    "moved": lambda s: s.flatten(0, 1).softmax(2).unflatten(0, (-1, 2)),
}
CHANGING: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "along queries": (lambda s: s.softmax(-2), "is not along the rows"),
    "transposed": (lambda s: s.transpose(-2, -1).softmax(-1), "do not reach softmax whole"),
    "scale of each key": (lambda s: (s * KEY_SCALES).softmax(-1), "(mul) reads scores"),
    "squared": (lambda s: (s * s).softmax(-1), "(mul) reads scores"),
    "inverted": (lambda s: (1 / (s.abs() + 1)).softmax(-1), "(abs) reads scores"),
    "small mask": (lambda s: s.masked_fill(MASK, -3.0).softmax(-1), "(masked_fill) reads scores"),
    "gate": (lambda s: s.softmax(-1) * s.sigmoid(), "(sigmoid) reads scores"),
}


@pytest.mark.parametrize("name", STAYING)
def test_scores_may_be_scaled_shifted_and_masked(name: str) -> None:
    centred(seeded(Scores(STAYING[name])), torch.randn(2, 5, 8), 2)


@pytest.mark.parametrize("name", CHANGING)
def test_keys_stay_where_a_row_of_scores_counts(name: str) -> None:
    attend, reason = CHANGING[name]
    gm = canonical(seeded(Scores(attend)), torch.randn(2, 5, 8))
    found = [str(site) for _, site in key_sites(gm)]
    assert len(found) == 1 and reason in found[0]


def test_values_stay_where_rows_do_not_sum_to_one() -> None:
    gm = canonical(seeded(Scores(lambda s: s.softmax(-1) * KEY_SCALES)), torch.randn(2, 5, 8))
    assert [str(site) for _, site in value_sites(gm)] == ["rows of attention do not sum to one"]


@pytest.mark.parametrize("between", [F.normalize, lambda x: x.roll(1, -1) * 0.5 + x])
def test_keys_that_are_changed_stay(between: Callable[[Tensor], Tensor]) -> None:
    model = residual(16, 4, depth=1, attention=partial(Attention, between=between))
    _, result = centred(model, points(), 1)
    assert "computes its left operand" in reasons(result)["attention_0_matmul"]


def test_heads_that_share_a_key_stay() -> None:
    model = residual(16, 4, depth=1, attention=partial(Expanded, kv_heads=1))
    _, result = centred(model, points(), 0)
    assert "does not belong to exactly one head" in str(reasons(result))


def test_linears_that_were_not_measured_stay() -> None:
    gm = canonical(residual(16, 4, depth=1), points(), seed=False)
    result = run_passes(gm, [CentreHeads({})])["CentreHeads"]
    assert result.changed == 0
    assert all("ranges were not measured" in reason for reason in reasons(result).values())
    assert len(result.notes) == 2


def test_the_wrong_stage_raises() -> None:
    gm, _ = annotated(Rule(spec=EIGHT))
    with refused(PassError, got=Stage.ANNOTATED, expected=Stage.FLOAT):
        head_ranges(gm, [tokens()])
