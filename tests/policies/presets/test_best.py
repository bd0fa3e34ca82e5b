"""The preset that puts the best parts together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor, nn

import fxquant
from fxquant import Budget, policies
from fxquant.cli import main
from fxquant.config.recovery import Scope, WeightTraining
from fxquant.config.vocabulary import Arg, End
from fxquant.errors import BitWidthError, PolicyError, UnknownKeyError
from fxquant.policies import Effort
from fxquant.policies.policy_file import policy_from_dict, policy_to_dict, read_policy
from fxquant.testing import DIM, relative_error, seeded, tokens
from tests.helpers.refusals import refused
from tests.helpers.towers import Stack


class Ends(nn.Module):
    """A first, a middle and a last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.head = (nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.gelu(self.stem(x))
        return self.head(nn.functional.relu(self.middle(x)))


def test_eight_bits_are_neither_searched_nor_trained() -> None:
    assert policies.best(full=True).rules == policies.w8a8(full=True).rules
    for effort in Effort:
        policy = policies.best(8, 8, effort)
        assert policy.search is None and not policy.recovers
        assert policy.rotate and policy.rotate_hidden and policy.trial_rotations
        assert policy.defer_softmax and policy.centre_heads


@pytest.mark.parametrize("bits", [4, 8])
def test_with_full_nothing_is_computed_in_float(bits: int) -> None:
    policy = policies.best(bits, 8, full=True)
    assert not policy.rotate_hidden and not policy.defer_softmax


@pytest.mark.parametrize("effort", Effort)
@pytest.mark.parametrize("widths", [(4, 4), (3, 8), (4, 16), (8, 6)])
def test_fewer_bits_are_compensated_and_trained_given_time(
    widths: tuple[int, int], effort: Effort
) -> None:
    policy = policies.best(*widths, effort)
    assert policy.compensation is not None
    trained = policy.reconstruction
    assert trained is not None
    assert trained.scope is Scope.NETWORK
    dense = policy.dense_reconstruction
    assert dense is not None and dense.scope is Scope.BLOCK
    assert (dense.max_macs is None) == (effort is Effort.HOURS)
    assert (trained.max_macs is None) == (effort is Effort.HOURS)
    few = effort is Effort.SECONDS
    assert policy.compensation.ridge != few, "of few images the ridge fits their noise"
    assert (trained.weights is WeightTraining.SCALES) == few
    weights = [r for r in policy.rules if r.spec and r.arg is Arg.WEIGHT]
    found = {(rule.end, rule.spec.bits) for rule in weights if rule.spec}
    assert found == {(None, widths[0]), *((end, 8) for end in End if widths[0] < 8)}
    assert policy_from_dict(policy_to_dict(policy)) == policy


def test_more_effort_takes_more_steps() -> None:
    for name in ("reconstruction", "dense_reconstruction"):
        found = [getattr(policies.best(4, 4, effort), name) for effort in Effort]
        steps = [trained.iterations for trained in found]
        assert steps == sorted(set(steps)) and len(steps) == len(Effort)


def test_a_network_that_is_too_large_for_seconds_is_not_trained() -> None:
    policy = policies.best(4, 6)
    assert policy.reconstruction is not None
    small = replace(policy, reconstruction=replace(policy.reconstruction, max_macs=1e4))
    report = fxquant.compile(seeded(Stack()), [tokens(24)], small).report
    assert report.changes["Reconstruct"] == 0
    assert "not trained: 10000 multiplications allow only 0 steps" in str(report)


def test_with_minutes_weights_are_moved_and_trained_within_the_work() -> None:
    policy = policies.best(3, 6, "minutes")
    # Of a rotated tower of this size little error is left to train away.
    policy = replace(policy, rotate=False)
    assert policy.reconstruction is not None
    few = replace(policy, reconstruction=replace(policy.reconstruction, iterations=200))
    model, batch = seeded(Stack()), tokens(96)
    report = fxquant.compile(model, [batch], few).report
    assert report.changes["Reconstruct"] == 1
    assert "ridge" in str(report) and "straight_through" in str(report)
    none = replace(few, reconstruction=replace(policy.reconstruction, max_macs=1e4))
    assert fxquant.compile(model, [batch], none).report.changes["Reconstruct"] == 0


def test_unknown_efforts_are_refused() -> None:
    text = "'minute' is unknown; did you mean 'minutes'"
    with refused(UnknownKeyError, text, got="minute", expected=("seconds", "minutes", "hours")):
        policies.best(4, 4, "minute")
    with refused(PolicyError, got="yes", expected=(True, False)):
        policies.best(4, 4, full="yes")  # type: ignore[arg-type]


def test_it_compiles() -> None:
    model, batch = seeded(Stack()), tokens(24)
    compiled = fxquant.compile(model, [batch], policies.best(4, 6))
    plain = fxquant.compile(model, [batch], policies.minmax(4, 6))
    exact = model(batch)
    assert relative_error(compiled(batch), exact) < relative_error(plain(batch), exact)


def test_the_first_and_last_layers_keep_their_bits() -> None:
    def bits(**options: int) -> dict[str, int]:
        # Widths do not hang on what is trained afterwards.
        policy = replace(policies.best(4, 5, **options), reconstruction=None)
        report = fxquant.compile(seeded(Ends()), [tokens(8)], policy).report
        return {entry.edge: entry.spec.bits for entry in report.plan if entry.spec}

    inner = {"middle__input": 5, "middle__weight": 4, "stem__input": 8}
    ends = dict.fromkeys(("stem__weight", "head__weight", "head__input"), 8)
    assert bits() == {**inner, **ends}
    assert bits(end_bits=6) == {**inner, **dict.fromkeys(ends, 6)}
    narrow = {"stem__weight": 4, "head__weight": 4, "head__input": 5}
    assert bits(end_bits=2) == {**inner, **narrow}
    names = [policies.best(4, 4, end_bits=least).name for least in (2, 6, 8)]
    assert names == ["best_w4a4_seconds_ends2", "best_w4a4_seconds_ends6", "best_w4a4_seconds"]
    for widths in ((4, 4), (8, 8)):
        with refused(BitWidthError, got=99, expected="2..16"):
            policies.best(*widths, end_bits=99)
    text, budget = "set either end_bits or budget: a budget chooses the width", Budget(mean_bits=4)
    with refused(PolicyError, text, got=(6, budget), expected="end_bits or budget"):
        policies.best(4, 4, end_bits=6, budget=budget)
    with refused(PolicyError, got=(8, budget), expected="end_bits or budget"):
        policies.best(4, 4, end_bits=8, budget=budget)
    for one in ("four", "4", None, True):
        with refused(BitWidthError, got=one, expected=int):
            policies.best(4, one)  # type: ignore[arg-type]


def test_an_image_that_the_last_layer_reads_stays_pinned() -> None:
    compiled = fxquant.compile(
        seeded(nn.Linear(DIM, 3)), [tokens(8)], policies.best(4, 4, end_bits=6)
    )
    found = {entry.arg: entry.spec.bits for entry in compiled.report.plan if entry.spec}
    assert found == {"input": 8, "weight": 6}


def test_the_command_line_has_its_options(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--weight-bits", "4", "--act-bits", "6", "--effort", "minutes", "--full"]
    arguments += ["--end-bits", "7"]
    assert main(["policies", "best", *arguments]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    expected = policies.best(4, 6, "minutes", end_bits=7, full=True)
    assert read_policy(tmp_path / "mine.yaml") == expected
    assert main(["policies", "ptq4vit", "--effort", "hours"]) == 2
    assert "preset ptq4vit has no effort: best takes it" in capsys.readouterr().err
