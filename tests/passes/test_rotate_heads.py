"""RotateHeads: queries, keys and values turn within each head, the function stays."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxquant import testing
from fxquant.config.vocabulary import Stage
from fxquant.errors import PassError
from fxquant.passes import PassResult, RotateHeads, run_passes
from fxquant.policies.policy import Rule
from fxquant.rotation.heads import HeadSite, head_sites
from fxquant.testing import DIM, HEADS, assert_same_function, op_names, tokens
from tests.helpers.refusals import refused
from tests.helpers.residual import Attention, Expanded, points, residual
from tests.helpers.stages import EIGHT, annotated, canonical, reasons
from tests.helpers.zoo import FAMILIES, Family, run_on_family


def rotated(
    model: nn.Module, x: Tensor, changed: int, *, seed: int = 0
) -> tuple[fx.GraphModule, PassResult]:
    """A canonical graph after the pass, what every such pass owes checked."""
    before = copy.deepcopy(model.state_dict())
    gm = canonical(model, x, seed=False)
    operations = op_names(gm)
    result = run_passes(gm, [RotateHeads(seed=seed)])["RotateHeads"]
    assert result.changed == changed and op_names(gm) == operations
    assert_same_function(gm, model, x)
    new = gm.state_dict()
    assert run_passes(gm, [RotateHeads(seed=seed)])["RotateHeads"].changed == 0
    assert all(torch.equal(value, gm.state_dict()[name]) for name, value in new.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return gm, result


# Attention products of real networks: rotated, and refused.
PRODUCTS = {
    "vit_tiny_patch16_224": (4, 0),
    "deit3_small_patch16_224": (4, 0),
    "swin_tiny_patch4_window7_224": (8, 0),
    "swinv2_tiny_window8_256": (4, 4),  # queries and keys are normalized
    "beit_base_patch16_224": (2, 0),
    "eva02_tiny_patch14_224": (1, 1),  # rotary embedding
    "cait_xxs24_224": (6, 0),  # attention mixed over heads
    "pvt_v2_b0": (8, 0),
    "levit_128s": (5, 5),  # hard-swish between attention and projection
    "maxvit_rmlp_pico_rw_256": (0, 8),  # projections stay packed
    "mobilevit_xxs": (4, 0),
    "vit_small_patch14_dinov2": (2, 0),
    "torchvision vit": (2, 0),  # heads and images on one axis
    "torchvision swin": (8, 0),
    "torchvision swin_v2": (4, 4),
    "torchvision maxvit": (8, 0),
}


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.name in PRODUCTS], ids=lambda family: family.name
)
def test_the_function_of_real_networks_stays(family: Family) -> None:
    result = run_on_family(family, RotateHeads())
    assert (result.changed, len(result.notes)) == PRODUCTS[family.name]


@settings(max_examples=12)
@given(head_width=st.integers(2, 8), heads=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_function_stays(head_width: int, heads: int, seed: int) -> None:
    rotated(residual(head_width * heads, heads, depth=1), points(), 2, seed=seed)


@pytest.mark.parametrize(
    "model", [testing.PackedAttention, testing.PerHeadAttention, testing.TorchAttention]
)
def test_any_packing_is_turned(model: type[nn.Module]) -> None:
    rotated(testing.seeded(model()), tokens(), 2)


def test_heads_are_found_by_their_channels() -> None:
    gm = canonical(residual(12, 3, depth=1), points(), seed=False)
    scores, values = (site for _, site in head_sites(gm))
    heads = torch.arange(12).view(3, 4)
    for site in (scores, values):
        assert isinstance(site, HeadSite) and site.shape == (3, 4)
        assert all(torch.equal(channels, heads) for _, channels in (*site.rows, *site.columns))
    assert [len(site.rows) for site in (scores, values)] == [2, 1]


def test_outlying_channels_of_a_head_disappear() -> None:
    model = residual(32, 2, depth=1)
    with torch.no_grad():
        model.attention[0].v.weight[5] *= 50
    values = []
    for gm in (canonical(model, points(), seed=False), rotated(model, points(), 2)[0]):
        (_, site) = list(head_sites(gm))[1]
        name = str(site.rows[0][0].args[1].target)
        values.append(gm.get_parameter(name) if "." in name else getattr(gm, name))
    before, after = ((value.abs().max() / value.std()).item() for value in values)
    assert after < 0.7 * before


# Refusals


def _rotary(x: Tensor) -> Tensor:
    return torch.cat([-x[..., 1:], x[..., :1]], -1) * 0.5 + x


def _normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


@pytest.mark.parametrize(
    ("between", "operation"), [(_rotary, "add"), (_normed, "layer_norm"), (F.normalize, "div")]
)
def test_queries_that_are_changed_stay(between: object, operation: str) -> None:
    model = residual(16, 4, depth=1, attention=partial(Attention, between=between))
    _, result = rotated(model, points(), 1)
    assert f"({operation}) computes its left operand" in reasons(result)["attention_0_matmul"]


def test_heads_that_share_keys_and_values_stay() -> None:
    model = residual(16, 4, depth=1, attention=partial(Attention, kv_heads=2))
    _, result = rotated(model, points(), 0)
    assert [reason.split("(")[1].split(")")[0] for reason in reasons(result).values()] == [
        "repeat_interleave",
        "repeat_interleave",
    ]


def test_heads_that_share_an_expanded_key_stay() -> None:
    model = residual(16, 4, depth=1, attention=partial(Expanded, kv_heads=1))
    _, result = rotated(model, points(), 0)
    one, two = reasons(result).values()
    assert "does not belong to exactly one head" in one and "once: heads share it" in two


class Read(nn.Module):
    """Attention whose queries or values are read by something else too."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.both = both
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.reshape(x.shape[0], -1, HEADS, DIM // HEADS).transpose(1, 2)

        q = heads(self.q(x))
        k = q if self.both else heads(self.k(x))
        v = self.v(x)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ heads(v)
        y = y.transpose(1, 2).reshape(x.shape)
        z: Tensor = self.proj(y) if self.both else self.proj(y) + v
        return z


def test_a_linear_of_both_operands_stays() -> None:
    _, result = rotated(testing.seeded(Read(both=True)), tokens(), 1)
    assert "q computes both operands" in reasons(result)["matmul"]


def test_values_that_another_operation_reads_stay() -> None:
    _, result = rotated(testing.seeded(Read(both=False)), tokens(), 1)
    assert "(add) reads v too" in reasons(result)["matmul_1"]


def test_heads_of_one_channel_stay() -> None:
    _, result = rotated(residual(4, 4, depth=1), points(), 0)
    assert all("a head has one channel" in reason for reason in reasons(result).values())


def test_the_wrong_stage_raises() -> None:
    gm, _ = annotated(Rule(spec=EIGHT))
    with refused(PassError, got=Stage.ANNOTATED, expected=Stage.FLOAT):
        run_passes(gm, [RotateHeads()])
