"""Passes that rewrite weights or names: FoldBatchNorm, SplitProjections, NameNodes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxquant import testing
from fxquant.graph.capture import capture
from fxquant.graph.nodes import get_parameter
from fxquant.passes import (
    CanonicalizeDataMovement,
    DropNoOps,
    FoldBatchNorm,
    NameNodes,
    SplitAttention,
    SplitProjections,
    run_passes,
)
from fxquant.passes.canonical.canonicalize import CANONICAL
from fxquant.testing import (
    DIM,
    HEADS,
    TOKENS,
    assert_pass,
    assert_same_function,
    images,
    op_names,
    product_names,
    seeded,
    tokens,
)


class Sequence(nn.Module):
    """``norm(reshape(first(x)))``, the reshape as given."""

    def __init__(self, first: nn.Module, norm: nn.Module, between: Callable[[Tensor], Tensor]):
        super().__init__()
        self.first, self.norm, self.between = first, norm, between

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.between(self.first(x)))


def identity(x: Tensor) -> Tensor:
    return x


# FoldBatchNorm


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("affine", [False, True])
def test_batch_norm_folds_into_a_convolution(bias: bool, groups: int, affine: bool) -> None:
    model = seeded(testing.ConvNorm(bias=bias, groups=groups, affine=affine))
    gm, result = assert_pass(model, images(), FoldBatchNorm(), changed=1)
    assert op_names(gm) == ["conv2d", "relu"]
    assert result.notes == ()


def test_batch_norm_folds_into_a_linear_over_flattened_tokens() -> None:
    gm, _ = assert_pass(
        seeded(testing.LinearNorm()), tokens(), FoldBatchNorm(), before=[DropNoOps()], changed=1
    )
    assert "batch_norm" not in op_names(gm)


def test_batch_norm_folds_into_a_linear_of_a_vector() -> None:
    model = seeded(Sequence(nn.Linear(DIM, 4), nn.BatchNorm1d(4), identity))
    gm, _ = assert_pass(model, tokens()[:, 0], FoldBatchNorm(), changed=1)
    assert op_names(gm) == ["linear"]


def test_batch_norm_between_two_layers_folds_into_the_first() -> None:
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)))
    gm, _ = assert_pass(model, images(), FoldBatchNorm(), changed=1)
    assert op_names(gm) == ["conv2d", "conv2d"]


class Shared(nn.Module):
    """The convolution feeds a sum as well as its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y


@pytest.mark.parametrize(
    ("model", "x", "reason"),
    [
        (Shared(), images(), "conv2d feeds other operations too"),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), images(), "it follows relu, which is not"),
        (
            Sequence(nn.Linear(DIM, 4), nn.BatchNorm1d(TOKENS), identity),
            tokens(),
            "it normalises another axis than the linear's output channels",
        ),
        (
            Sequence(nn.Linear(DIM, 4), nn.BatchNorm1d(4 * TOKENS), lambda y: y.flatten(1)),
            tokens(),
            "its input is reshaped in a way that mixes channels",
        ),
        (
            Sequence(nn.Conv2d(3, 4, 1), nn.BatchNorm1d(4), lambda y: y.flatten(2)),
            images(),
            "its input is reshaped in a way that may mix channels",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
            images(),
            "a parameter is not a constant",
        ),
    ],
    ids=["shared", "no product", "other axis", "mixed", "3-d", "statistics of the batch"],
)
def test_batch_norm_stays_and_says_why(model: nn.Module, x: Tensor, reason: str) -> None:
    gm, result = assert_pass(seeded(model), x, FoldBatchNorm(), before=[DropNoOps()], changed=0)
    (skip,) = result.notes
    assert skip.reason.startswith("batch norm stays: ") and reason in skip.reason
    assert "batch_norm" in op_names(gm)


# SplitProjections


@pytest.mark.parametrize(
    ("attention", "parts"),
    [
        (testing.PackedAttention, 4),
        (testing.PerHeadAttention, 4),
        (testing.KvAttention, 3),
        (testing.TorchAttention, 4),
    ],
)
def test_each_packing_is_split(attention: Callable[[], nn.Module], parts: int) -> None:
    gm, result = assert_pass(
        seeded(attention()),
        tokens(3),
        SplitProjections(),
        before=[DropNoOps(), SplitAttention()],
        changed=1,
    )
    assert op_names(gm).count("linear") == parts
    assert not {"unbind", "split", "split_with_sizes", "chunk"} & set(op_names(gm))
    assert result.notes == ()


def test_vit_of_timm_is_split(vit: nn.Module) -> None:
    gm, _ = assert_pass(vit, images(2, 16), SplitProjections(), before=CANONICAL[:6], changed=1)
    assert op_names(gm).count("linear") == 7  # q, k, v, proj, fc1, fc2, head


@pytest.mark.parametrize("name", ["levit_128s", "pvt_v2_b0"])
def test_other_models_of_timm_keep_their_function(name: str) -> None:
    torch.manual_seed(0)
    sizes = {
        "levit_128s": {"embed_dim": (16, 16), "num_heads": (2, 2), "depth": (1, 1), "key_dim": 4},
        "pvt_v2_b0": {"depths": (1, 1), "embed_dims": (8, 16), "num_heads": (1, 2)},
    }[name]
    if name.startswith("pvt"):
        sizes |= {"sr_ratios": (2, 1), "mlp_ratios": (2, 2)}
    model = timm.create_model(name, num_classes=3, **sizes).eval()
    x = images(2, 224 if name.startswith("levit") else 32)
    gm = capture(model, x)
    results = run_passes(gm, CANONICAL)
    assert results["SplitProjections"].changed >= 1
    assert_same_function(gm, model, x, 1e-4)


@settings(max_examples=8)
@given(
    heads=st.integers(1, 3),
    width=st.integers(1, 3),
    order=st.permutations([0, 1, 2]),
    bias=st.booleans(),
)
def test_any_order_of_packing_keeps_the_function(
    heads: int, width: int, order: list[int], bias: bool
) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(DIM, 3 * heads * width, bias=bias)
            self.sizes = [(3, heads, width)[i] for i in order]

        def forward(self, x: Tensor) -> Tensor:
            y = self.qkv(x).unflatten(-1, self.sizes).movedim(2 + order.index(0), 0)
            a, b, c = y.unbind(0)
            return a * b + c.sin()

    gm, _ = assert_pass(
        seeded(Packed()),
        tokens(),
        SplitProjections(),
        before=[CanonicalizeDataMovement()],
        changed=1,
    )
    assert op_names(gm).count("linear") == 3


class Packed(nn.Module):
    """A linear of twice the width, and what is done to it."""

    def __init__(self, unpack: Callable[[Tensor], Tensor], width: int = 2 * DIM) -> None:
        super().__init__()
        self.linear, self.unpack = nn.Linear(DIM, width), unpack

    def forward(self, x: Tensor) -> Tensor:
        return self.unpack(self.linear(x))


def test_a_packing_inside_a_packing_is_split_too() -> None:
    def nested(y: Tensor) -> Tensor:
        q, kv = y.split([DIM, 2 * DIM], dim=-1)
        k, v = kv.chunk(2, dim=-1)
        return q * k + v

    gm = capture(seeded(Packed(nested, 3 * DIM)), tokens())
    run_passes(gm, [SplitProjections()])
    assert op_names(gm).count("linear") == 3
    assert_same_function(gm, seeded(Packed(nested, 3 * DIM)), tokens())
    assert run_passes(gm, [SplitProjections()])["SplitProjections"].changed == 0


@pytest.mark.parametrize(
    ("unpack", "x", "reason"),
    [
        (
            lambda y: (p := y.chunk(2, 1))[0] + p[1],
            torch.randn(2, 4, DIM),
            "its tokens are split",
        ),
        (
            lambda y: (p := y.reshape(y.shape[0], 2, -1).unbind(1))[0] * p[1],
            torch.randn(2, 4, DIM),
            "tokens and channels are mixed on one axis",
        ),
        (
            lambda y: (p := y.unflatten(1, (2, 2)).chunk(2, -1))[0] * p[1],
            torch.randn(2, 4, DIM),
            "its tokens are spread over several axes",
        ),
        (
            lambda y: (p := y.roll(1, 1).chunk(2, -1))[0] * p[1],
            torch.randn(2, 4, DIM),
            "its tokens change their order",
        ),
        (
            lambda y: (p := y.split([DIM, DIM], -1))[0] * p[1],
            torch.randn(2, 1, DIM),
            "an axis of length one hides which axis it is",
        ),
        (
            lambda y: y[..., :DIM] + y[..., 1 : DIM + 1],
            torch.randn(2, 4, DIM),
            "do not divide its output channels",
        ),
    ],
    ids=["split tokens", "mixed", "windows", "rolled", "one token", "overlapping"],
)
def test_a_projection_stays_and_says_why(
    unpack: Callable[[Tensor], Tensor], x: Tensor, reason: str
) -> None:
    gm, result = assert_pass(seeded(Packed(unpack)), x, SplitProjections(), changed=0)
    (skip,) = result.notes
    assert skip.reason.startswith("the packed projection stays: ") and reason in skip.reason
    assert op_names(gm).count("linear") == 1


def test_a_linear_that_is_not_packed_is_no_site() -> None:
    _, result = assert_pass(
        seeded(Packed(lambda y: y.relu().unbind(-1)[0])), tokens(), SplitProjections(), changed=0
    )
    assert result.notes == ()


def test_the_parts_hold_the_rows_of_the_packed_weight() -> None:
    model = seeded(testing.PackedAttention())
    gm = capture(model, tokens())
    run_passes(gm, [SplitAttention(), SplitProjections()])
    parts = [
        get_parameter(gm, n.args[1])
        for n in gm.graph.nodes
        if n.target is torch.ops.aten.linear.default
    ]
    assert torch.equal(torch.cat(parts[:3]), model.qkv.weight)


# NameNodes


def test_products_are_named_after_their_modules() -> None:
    gm = capture(seeded(testing.Block()), tokens())
    result = run_passes(gm, [SplitAttention(), NameNodes()])["NameNodes"]
    names = ["attn_qkv", "attn_matmul", "attn_matmul_1", "attn_proj", "fc1", "fc2"]
    assert product_names(gm) == names
    between = ["norm1", "attn_softmax", "norm2"]  # gelu and add have their names already
    assert [node.name for node in gm.graph.nodes if node.name in between] == between
    assert result.changed == len(names) + len(between)
    assert run_passes(gm, [NameNodes()])["NameNodes"].changed == 0
    assert product_names(gm) == names
    assert_same_function(gm, seeded(testing.Block()), tokens())


def test_names_are_unique_where_a_module_runs_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(DIM, DIM)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    gm = capture(seeded(Twice()), tokens())
    run_passes(gm, [NameNodes()])
    assert product_names(gm) == ["layer", "layer_1"]


def test_products_of_the_root_go_by_their_kind() -> None:
    gm = capture(seeded(nn.Linear(DIM, DIM)), tokens())
    run_passes(gm, [NameNodes()])
    assert product_names(gm) == ["linear"]


@pytest.mark.parametrize("size", [HEADS, 3])
def test_modules_with_numbers_for_names(size: int) -> None:
    gm = capture(seeded(nn.Sequential(*[nn.Linear(DIM, DIM) for _ in range(size)])), tokens())
    run_passes(gm, [NameNodes()])
    assert product_names(gm) == [f"_{i}" for i in range(size)]
    assert run_passes(gm, [NameNodes()])["NameNodes"].changed == 0
