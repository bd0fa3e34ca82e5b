"""Passes that bring products to the dialect: no-ops, linears, scalar factors, constants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fxquant import testing
from fxquant.graph.capture import capture
from fxquant.passes import (
    DropNoOps,
    FoldConstants,
    ScaleAfterMatmul,
    ToLinear,
    run_passes,
)
from fxquant.testing import (
    DIM,
    TOKENS,
    assert_pass,
    assert_same_function,
    op_names,
    seeded,
    tokens,
)
from tests.helpers.functions import model

# DropNoOps


def test_dropout_clones_and_casts_to_the_same_type_are_dropped() -> None:
    def noisy(x: Tensor, w: Tensor) -> Tensor:
        y = F.dropout(x, 0.5, training=False).clone().contiguous()
        return (y.to(torch.float32) @ w).detach()

    gm, _ = assert_pass(model(noisy), tokens(), DropNoOps(), changed=5)
    assert op_names(gm) == ["matmul"]


def test_a_cast_that_changes_the_type_stays() -> None:
    # The three sites are checks of a type at run time, which export adds.
    gm, _ = assert_pass(
        model(lambda x, w: (x.double() @ w.double()).float()), tokens(), DropNoOps(), changed=3
    )
    assert op_names(gm).count("to") == 3


def test_dropout_that_acts_in_eval_mode_stays() -> None:
    gm = capture(model(lambda x, w: F.dropout(x @ w, 0.5, training=True)), tokens())
    assert run_passes(gm, [DropNoOps()])["DropNoOps"].changed == 0
    assert op_names(gm) == ["matmul", "dropout"]


def test_a_view_of_a_dropped_clone_still_works() -> None:
    gm, _ = assert_pass(
        model(lambda x, w: (x @ w).transpose(1, 2).contiguous().view(x.shape[0], -1)),
        tokens(),
        DropNoOps(),
        changed=2,
    )
    assert op_names(gm) == ["matmul", "transpose", "reshape"]


@torch.library.custom_op("fxquant_tests::strict", mutates_args=())
def strict(x: Tensor) -> Tensor:
    """An operator of somebody else's that takes contiguous tensors alone."""
    assert x.is_contiguous()
    return x + 1


@strict.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize(
    "read",
    [
        lambda y: torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * 1j),
        lambda y: y.view(torch.int32).bitwise_not().view(torch.float32).nan_to_num(),
        strict,
    ],
    ids=["complex", "other type", "custom operator"],
)
def test_a_copy_stays_where_the_layout_matters(read: Any) -> None:
    def heads_last(x: Tensor, w: Tensor) -> Tensor:
        y = F.pad(x @ w, (0, 0, 0, 1)).transpose(1, 2).contiguous()
        return read(y).clone()

    gm, _ = assert_pass(model(heads_last), tokens(), DropNoOps(), changed=1)
    assert "contiguous" in op_names(gm) and "clone" not in op_names(gm)


def test_reshape_as_becomes_a_reshape_to_that_size() -> None:
    gm, _ = assert_pass(
        model(lambda x, w: (x @ w).flatten(0, 1).reshape_as(x)), tokens(), DropNoOps(), changed=1
    )
    assert op_names(gm) == ["matmul", "flatten", "reshape"]


# ToLinear


@pytest.mark.parametrize(
    ("function", "shape", "names"),
    [
        (lambda x, w: x @ w, (DIM, 3), ["linear"]),
        (lambda x, w: x.flatten(0, 1).mm(w), (DIM, 3), ["flatten", "linear"]),
        (lambda x, w: x @ w, (1, DIM, 3), ["linear"]),
        (lambda x, w: torch.addmm(w[0], x.flatten(0, 1), w), (DIM, DIM), None),
        (lambda x, w: torch.bmm(x, x.transpose(1, 2)), (), ["transpose", "matmul"]),
    ],
    ids=["matmul", "mm", "batch of one weight", "addmm", "bmm"],
)
def test_products_become_linear_or_matmul(
    function: Any, shape: tuple[int, ...], names: list[str] | None
) -> None:
    gm, _ = assert_pass(
        model(function, *shape), tokens(), ToLinear(), before=[FoldConstants()], changed=1
    )
    if names is None:
        assert "linear" in op_names(gm) and "addmm" not in op_names(gm)
    else:
        assert op_names(gm) == names


def test_addmm_becomes_a_linear_with_bias_and_bmm_a_matmul() -> None:
    gm, _ = assert_pass(seeded(testing.Products()), tokens(), ToLinear(), changed=2)
    assert op_names(gm) == ["flatten", "linear", "reshape", "transpose", "matmul"]
    (linear,) = (n for n in gm.graph.nodes if "linear" in str(n.target))
    assert len(linear.args) == 3


@pytest.mark.parametrize(("alpha", "beta"), [(1, 1), (0.5, 2.0), (2.0, 0), (1, 0.5)])
def test_factors_of_addmm_and_baddbmm_are_kept(alpha: float, beta: float) -> None:
    def products(x: Tensor, w: Tensor) -> Tensor:
        flat = torch.addmm(w[0], x.flatten(0, 1), w, alpha=alpha, beta=beta).view_as(x)
        return torch.baddbmm(flat, x @ x.transpose(1, 2), x, alpha=alpha, beta=beta)

    assert_pass(model(products), tokens(), ToLinear(), before=[FoldConstants()], changed=2)


def test_factors_of_one_add_no_operation() -> None:
    def biased(x: Tensor, _: Tensor) -> Tensor:
        return torch.baddbmm(x @ x.transpose(1, 2), x, x.transpose(1, 2))

    gm, _ = assert_pass(model(biased), tokens(), ToLinear(), changed=1)
    assert "add" in op_names(gm) and "mul" not in op_names(gm)


def test_a_weight_with_more_axes_than_the_tokens_keeps_the_shape_of_the_result() -> None:
    flat = model(lambda x, w: x.flatten(0, 1) @ w, 1, DIM, 3)
    gm = capture(flat, tokens())
    run_passes(gm, [ToLinear()])
    assert gm(tokens()).shape == (1, 2 * TOKENS, 3)
    assert_same_function(gm, flat, tokens())


def test_a_product_of_activations_is_in_the_dialect_already() -> None:
    gm, result = assert_pass(
        model(lambda x, _: x @ x.transpose(1, 2)), tokens(), ToLinear(), changed=0
    )
    assert op_names(gm) == ["transpose", "matmul"] and result.notes == ()


# ScaleAfterMatmul


@pytest.mark.parametrize(
    ("function", "changed"),
    [
        (lambda x, _: (x * 0.5) @ x.transpose(1, 2), 1),
        (lambda x, _: x @ (x.transpose(1, 2) * 0.5), 1),
        (lambda x, _: (x * 0.5) @ (x * 3).transpose(1, 2), 2),
        (lambda x, _: (x * 0.5 * 3) @ x.transpose(1, 2), 2),
        (lambda x, _: (x * 0.5).transpose(1, 2).reshape(-1, DIM, TOKENS) @ x, 1),
        (lambda x, _: (x / 3.0) @ x.transpose(1, 2), 1),
        (lambda x, _: (x / torch.tensor(3.0).sqrt()) @ x.transpose(1, 2), 1),
        (lambda x, w: (w[0, :1] * x) @ x.transpose(1, 2), 1),
    ],
    ids=["left", "right", "both", "twice", "through moves", "divided", "constant", "constant left"],
)
def test_a_factor_moves_behind_the_product(function: Any, changed: int) -> None:
    gm, _ = assert_pass(
        model(function), tokens(), ScaleAfterMatmul(), before=[FoldConstants()], changed=changed
    )
    names = op_names(gm)
    assert "div" not in names and names[-2:] == ["matmul", "mul"] and names.count("mul") == 1


def test_a_factor_of_both_operands_at_once_counts_twice() -> None:
    def squared(x: Tensor, w: Tensor) -> Tensor:
        y = (x.transpose(1, 2) @ x) * 0.5
        return y @ y

    assert_pass(model(squared), tokens(), ScaleAfterMatmul(), changed=1)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: (x * w[0]) @ w,
        lambda x, w: (w[0, 0] / (x.abs() + 1)) @ w,
        lambda x, w: (x * w[None, None, :1, :1]) @ w,
        lambda x, w: ((x > 0).long() * w[0, 0]) @ w,
        lambda x, w: (y := x * 2) @ w + y,
        lambda x, w: F.gelu(x * 2) @ w,
        lambda x, w: F.pad(x * 2, (0, 0, 0, 1), value=1.0) @ w,
    ],
    ids=[
        "by a tensor",
        "divisor",
        "one more axis",
        "of integers",
        "used elsewhere too",
        "behind another function",
        "padded with ones",
    ],
)
def test_other_factors_stay(function: Any) -> None:
    before = [FoldConstants()]
    assert_pass(model(function), tokens(), ScaleAfterMatmul(), before=before, changed=0)


# FoldConstants


def test_what_depends_on_parameters_alone_is_computed_once() -> None:
    def relative_bias(x: Tensor, table: Tensor) -> Tensor:
        position = (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs() % DIM
        return x @ x.transpose(1, 2) + table[position].sum(-1).sigmoid()

    gm = capture(model(relative_bias), tokens())
    assert run_passes(gm, [FoldConstants()])["FoldConstants"].changed > 0
    assert run_passes(gm, [FoldConstants()])["FoldConstants"].changed == 0
    assert op_names(gm) == ["transpose", "matmul", "add"]
    assert_same_function(gm, model(relative_bias), tokens())


def test_expand_stays_since_as_a_constant_it_takes_memory() -> None:
    gm, _ = assert_pass(
        model(lambda x, w: x + (w[0] * 2).expand(1000, TOKENS, DIM)[:1]),
        tokens(),
        FoldConstants(),
        changed=2,
    )
    assert op_names(gm) == ["expand", "slice", "add"]


def test_random_numbers_are_not_folded() -> None:
    gm = capture(model(lambda x, w: x + torch.rand(DIM)), tokens())
    run_passes(gm, [FoldConstants()])
    assert op_names(gm) == ["rand", "add"]


def test_a_transposed_weight_is_seen_as_a_weight() -> None:
    gm = capture(model(lambda x, w: x @ w.t().contiguous()), tokens())
    run_passes(gm, [FoldConstants(), ToLinear()])
    assert op_names(gm) == ["linear"]


def test_a_mask_that_starts_from_new_zeros_is_a_constant() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        mask = x.new_zeros(TOKENS, 1)
        mask[1:3] = 2.0
        return x + mask

    gm = capture(model(function), tokens())
    assert run_passes(gm, [FoldConstants()])["FoldConstants"].changed > 2
    assert run_passes(gm, [FoldConstants()])["FoldConstants"].changed == 0
    assert op_names(gm) == ["add"]
    assert_same_function(gm, model(function), tokens())


def test_zeros_of_the_size_of_the_batch_stay() -> None:
    function = model(lambda x, w: x + x.new_zeros(x.shape[0], 1, 1))
    gm, _ = assert_pass(function, tokens(), FoldConstants(), changed=0)
    assert op_names(gm) == ["new_zeros", "add"]
