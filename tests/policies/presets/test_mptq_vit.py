"""The preset mptq_vit as a whole: its parts together, through every way out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import Allocation, Budget, policies
from fxquant.config.vocabulary import OpKind
from fxquant.errors import BatchError
from fxquant.policies.policy_file import policy_from_dict, policy_to_dict
from fxquant.testing import DIM, Block, relative_error, seeded, tokens
from tests.helpers.refusals import refused

MIXED = policies.mptq_vit(4, 4, budget=Budget(mean_bits=5), full=True)
BATCH = tokens(8)


def test_files_hold_the_policy() -> None:
    assert policy_from_dict(policy_to_dict(MIXED)) == MIXED
    assert MIXED.smooth
    assert MIXED.search is not None
    assert MIXED.search.search_region_ratio


@pytest.mark.slow
def test_all_parts_together_leave_by_every_way(tmp_path: Path) -> None:
    model = seeded(Block())
    with torch.no_grad():
        model.norm2.weight[0] *= 60
        model.fc1.weight[:, 0] /= 60
    compiled = fxquant.compile(model, [BATCH], MIXED)
    assert compiled.report.changes["SmoothWithBias"] > 0
    assert {item.step for item in compiled.report.comparisons} == {"SmoothWithBias", "SearchScales"}
    products = [e.spec for e in compiled.plan if e.op in ("linear", "matmul") and e.spec]
    assert len({spec.bits for spec in products}) > 1
    assert compiled.report.allocation is not None
    assert compiled.report.allocation.costs["mean_bits"] <= 5
    between = {entry.op for entry in compiled.plan if entry.spec is not None}
    assert {OpKind.ADD, OpKind.SOFTMAX, OpKind.LAYER_NORM, OpKind.ACTIVATION} <= between

    result = compiled(BATCH)
    integer = compiled.lower("integer", integer_only=True)
    assert relative_error(integer(BATCH), result) < 0.02
    compiled.export_onnx(tmp_path / "model.onnx")  # which checks onnxruntime against it
    compiled.save(tmp_path / "saved")
    assert torch.equal(fxquant.load(tmp_path / "saved")(BATCH), result)


def test_batches_that_can_be_read_once_are_refused_at_once() -> None:
    text, loader = r"more than once.*pass a list or a DataLoader", iter([BATCH])
    with refused(BatchError, text, got=loader, expected="an iterable that can be read again"):
        fxquant.compile(seeded(Block()), loader, policies.mptq_vit())


class PostNorm(nn.Module):
    """A residual stream that an addition and a linear read."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = (nn.Linear(DIM, DIM) for _ in range(3))
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.head(x + self.norm(self.two(x)))


def test_what_an_addition_reads_too_keeps_its_width() -> None:
    budget = Allocation(budget=Budget(mean_weight_bits=4.5), widths=(4, 5))
    policy = replace(policies.w8a8(full=True), allocation=budget)
    compiled = fxquant.compile(seeded(PostNorm()), [BATCH], policy)
    widths = {entry.edge: entry.spec.bits for entry in compiled.plan if entry.spec}
    assert widths["add__lhs"] == widths["two__input"] == 8
    assert {widths["two__weight"], widths["one__weight"], widths["head__weight"]} <= {4, 5}
