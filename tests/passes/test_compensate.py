"""Closed-form compensation as a pass and as part of a policy."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxquant
from fxquant import policies
from fxquant.config.low_rank import LowRank
from fxquant.config.recovery import Compensation, Reconstruction
from fxquant.config.spec import Granularity, TensorSpec
from fxquant.config.vocabulary import Arg
from fxquant.errors import BatchError, PolicyError
from fxquant.graph.macs import MacCounter
from fxquant.passes import Compensate, PassResult, run_passes
from fxquant.passes import compensate as closed_form
from fxquant.policies.policy import Policy, Rule
from fxquant.policies.policy_file import policy_from_dict, policy_to_dict
from fxquant.reconstruction.blockwise import BlockwiseRunner
from fxquant.reconstruction.image_split import split_images
from fxquant.testing import DIM, Block, relative_error, seeded, tokens
from tests.helpers import stages
from tests.helpers.agreement import assert_same_codes
from tests.helpers.refusals import refused
from tests.helpers.stages import EIGHT, reasons

THREE = TensorSpec(bits=3, symmetric=True, granularity=Granularity.CHANNEL)
BATCH = tokens(24)


def frozen(model: nn.Module | None = None) -> fx.GraphModule:
    return stages.frozen(Rule(arg=Arg.WEIGHT, spec=THREE), Rule(spec=EIGHT), model=model)


def compensate(gm: fx.GraphModule, x: Tensor = BATCH, **options: Any) -> PassResult:
    item = Compensate(BlockwiseRunner(gm, x), Compensation(**options))
    return run_passes(gm, [item])["Compensate"]


def test_outputs_come_nearer_to_the_float_ones() -> None:
    gm = frozen()
    exact = seeded(Block())(BATCH)
    before = relative_error(gm(BATCH), exact)
    result = compensate(gm)
    assert result.changed == 6
    assert all(gain.error_ratio < 1 for gain in result.comparisons)
    assert relative_error(gm(BATCH), exact) < 0.9 * before


def test_a_ridge_is_judged_by_images_left_out_where_there_are_few() -> None:
    gm, x = frozen(), tokens(8)
    for count, folds in ((0, 4), (9, 4), (100, 4)):
        options = Compensation(images=count, ridge=True)
        sides, parts = closed_form._in_folds(BlockwiseRunner(gm, x), gm, options)
        assert {fold for _, fold in parts} == set(range(folds))
        assert sum(len(sides.images[part]) for part, _ in parts) == max(count, 8)
    result = compensate(gm, x, images=0, ridge=True)
    assert any("ridge" in gain.choice for gain in result.comparisons)


@pytest.mark.parametrize("options", [{"ridge": True}, {"gptq": False, "ridge": True}])
def test_each_part_does_something_of_its_own(options: dict[str, bool]) -> None:
    gm, other = frozen(), frozen()
    assert compensate(gm, **options).changed == 6
    compensate(other)
    assert not torch.equal(gm(BATCH), other(BATCH))


def test_a_weight_stays_where_its_rounding_would_be_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bias alone then makes up for the error."""
    round_weight = closed_form.round_weight

    def worse(*args: Any) -> Any:
        found = round_weight(*args)
        return replace(found, latent=-found.latent, values=-found.values)

    gm = frozen()
    exact = seeded(Block())(BATCH)
    weights = [v.clone() for k, v in gm.state_dict().items() if k.endswith("weight")]
    before = relative_error(gm(BATCH), exact)
    monkeypatch.setattr(closed_form, "round_weight", worse)
    gains = compensate(gm).comparisons
    assert [(gain.choice, gain.error_ratio) for gain in gains] == [("bias", 1.0)] * 6
    after = [v for k, v in gm.state_dict().items() if k.endswith("weight")]
    assert any(torch.equal(weights[0], value) for value in after)
    assert relative_error(gm(BATCH), exact) < before


def test_the_ridge_is_left_out_with_one_image_and_says_so() -> None:
    gm, plain = frozen(), frozen()
    found = compensate(gm, BATCH[:1], ridge=True)
    (skip,) = found.notes
    assert (skip.site, found.changed) == ("network", 6)
    assert skip.reason.startswith("no ridge: ")
    compensate(plain, BATCH[:1])
    assert torch.equal(gm(BATCH), plain(BATCH))


def test_the_second_run_changes_nothing() -> None:
    gm = frozen()
    compensate(gm)
    found = gm(BATCH)
    assert compensate(gm).changed == 0
    assert torch.equal(gm(BATCH), found)


def test_the_float_network_stays_what_it_was() -> None:
    gm = frozen()
    untouched = copy.deepcopy(gm)
    sides = BlockwiseRunner(gm, BATCH)
    once = copy.deepcopy(gm)
    run_passes(once, [Compensate(sides, Compensation())])
    run_passes(gm, [Compensate(sides, Compensation())])
    assert torch.equal(once(BATCH), gm(BATCH))
    assert not torch.equal(untouched(BATCH), gm(BATCH))


class Shared(nn.Module):
    """Two products of one weight, and a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(DIM, DIM))
        self.conv = nn.Conv1d(DIM, DIM, 3, groups=DIM)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(nn.functional.linear(x, self.weight).relu(), self.weight)
        return self.conv(y.transpose(1, 2))


def test_refusals_say_why() -> None:
    gm = frozen(Shared())
    result = compensate(gm, tokens())
    assert result.changed == 0
    found = set(reasons(result).values())
    assert any("several products share the weight" in reason for reason in found)
    assert any("grouped convolution" in reason for reason in found)


class Patches(nn.Module):
    """A patch embedding with padding, stride and dilation, and a linear without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(DIM, 6, 3, stride=2, padding=2, dilation=2)
        self.linear = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x.transpose(1, 2)).transpose(1, 2))


def test_convolutions_and_missing_biases() -> None:
    gm = frozen(Patches())
    exact = seeded(Patches())(BATCH)
    before = (gm(BATCH) - exact).square().mean()
    assert compensate(gm).changed == 2
    assert (gm(BATCH) - exact).square().mean() < before


def policy() -> Policy:
    return replace(policies.ptq4vit(3, 6, twin=False), compensation=Compensation())


def test_a_policy_compensates_and_leaves_by_every_way(tmp_path: Path) -> None:
    model = seeded(Block())
    plain = fxquant.compile(model, [BATCH], replace(policy(), compensation=None))
    compiled = fxquant.compile(model, [BATCH], policy())
    exact = model(BATCH)
    assert relative_error(compiled(BATCH), exact) < relative_error(plain(BATCH), exact)
    assert "Compensate" in {item.step for item in compiled.report.comparisons}
    compiled.export_onnx(tmp_path / "model.onnx")  # which checks onnxruntime against it
    assert_same_codes(compiled, tmp_path / "model.onnx", BATCH)
    assert relative_error(compiled.lower("integer")(BATCH), compiled(BATCH)) < 1e-4
    compiled.save(tmp_path / "saved")
    assert torch.equal(fxquant.load(tmp_path / "saved")(BATCH), compiled(BATCH))


@pytest.mark.parametrize(("share", "fitted"), [(0.25, 18), (0.0, 24)])
def test_images_that_judge_a_training_are_new_to_the_weights(
    share: float, fitted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def run(self: Compensate, gm: fx.GraphModule) -> PassResult:
        assert self.split is not None
        seen.append(self.runner.images[self.split.training])
        return PassResult(0)

    monkeypatch.setattr(Compensate, "run", run)
    trained = Reconstruction(held_out=share, iterations=1)
    fxquant.compile(seeded(Block()), [BATCH], replace(policy(), reconstruction=trained))
    training = split_images(24, trained).training
    assert len(training) == fitted
    assert torch.equal(seen[0], BATCH[training])


def test_images_are_made_where_few_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given ones and others: weights fitted to few images alone do worse on new ones."""
    counts: list[int] = []
    walk = BlockwiseRunner.walk

    def counting(self: BlockwiseRunner, *args: Any) -> Any:
        counts.append(len(self.images))
        return walk(self, *args)

    monkeypatch.setattr(BlockwiseRunner, "walk", counting)
    few, others = BATCH[:2], tokens(64)[24:]
    errors = []
    for least in (0, 1, 40):
        gm = frozen()
        with torch.no_grad():
            exact = seeded(Block())(others)
            run_passes(gm, [Compensate(BlockwiseRunner(gm, few), Compensation(images=least))])
            errors.append(float((gm(others) - exact).square().mean()))
    assert counts == [2, 2, 40]
    assert errors[2] < errors[1] == errors[0]


def test_images_are_made_as_far_as_the_work_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = frozen()
    monkeypatch.setattr(closed_form, "_MAX_MACS", 7.5 * MacCounter(gm).total)
    sides = BlockwiseRunner(gm, BATCH[:5])
    plain, ridge = (Compensation(images=100, ridge=flag) for flag in (False, True))
    made = closed_form._in_folds(sides, gm, plain)[0].images
    assert len(made) == 7 and torch.equal(made[:5], BATCH[:5])
    assert torch.equal(made, closed_form._in_folds(sides, gm, plain)[0].images)
    folded, parts = closed_form._in_folds(sides, gm, ridge)
    assert [(part.stop - part.start, fold) for part, fold in parts] == [
        (3, 0),
        (2, 1),
        (1, 2),
        (1, 3),
    ]
    firsts = torch.cat([folded.images[0:2], folded.images[3:4], folded.images[5:]])
    assert torch.equal(firsts, BATCH[:5])


def test_files_hold_it() -> None:
    changed = replace(policy(), compensation=Compensation(ridge=True, damping=0.1))
    for item in (policy(), changed):
        assert policy_from_dict(policy_to_dict(item)) == item


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(PolicyError, match="turn on gptq, ridge or both"):
        Compensation(gptq=False)
    with refused(PolicyError, got=0, expected="a number in [1e-06, 1]"):
        Compensation(damping=0)
    with refused(PolicyError, "low_rank adds branches", got=LowRank(rank=1), expected=None):
        replace(policy(), low_rank=LowRank(rank=1))
    with refused(BatchError, expected="an iterable that can be read again"):
        fxquant.compile(seeded(Block()), iter([BATCH]), policy())
