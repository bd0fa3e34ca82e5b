"""The preset that puts the best parts together."""

from __future__ import annotations

from pathlib import Path

import pytest

import fxquant
from fxquant import policies
from fxquant.cli import main
from fxquant.errors import PolicyError, UnknownKeyError
from fxquant.policies import Effort
from fxquant.policy_file import policy_from_dict, policy_to_dict, read_policy
from fxquant.recovery import Scope
from fxquant.spec import Arg
from fxquant.testing import relative_error, seeded, tokens
from tests.test_blocks import Stack


def test_eight_bits_are_those_of_integer_kernels() -> None:
    assert policies.best().rules == policies.w8a8().rules
    assert policies.best(full=True).rules == policies.w8a8(full=True).rules
    for effort in Effort:
        assert not policies.best(8, 8, effort).recovers, "nothing is trained at 8 bits"


@pytest.mark.parametrize("effort", Effort)
@pytest.mark.parametrize("widths", [(4, 4), (3, 8), (4, 16), (8, 6)])
def test_fewer_bits_are_compensated_and_trained_given_time(
    widths: tuple[int, int], effort: Effort
) -> None:
    policy = policies.best(*widths, effort)
    assert policy.compensation is not None
    trained = policy.reconstruction
    assert (trained is None) == (effort is Effort.SECONDS)
    assert trained is None or trained.scope is Scope.NETWORK
    found = {rule.spec.bits for rule in policy.rules if rule.spec and rule.arg is Arg.WEIGHT}
    assert found == {widths[0]}
    assert policy_from_dict(policy_to_dict(policy)) == policy


def test_more_effort_takes_more_steps() -> None:
    minutes, hours = (policies.best(4, 4, e).reconstruction for e in ("minutes", "hours"))
    assert minutes is not None
    assert hours is not None
    assert hours.iterations > minutes.iterations


def test_unknown_efforts_are_refused() -> None:
    with pytest.raises(UnknownKeyError, match="'minute' is unknown; did you mean 'minutes'"):
        policies.best(4, 4, "minute")
    with pytest.raises(PolicyError, match="full"):
        policies.best(4, 4, full="yes")  # type: ignore[arg-type]


def test_it_compiles() -> None:
    model, batch = seeded(Stack()), tokens(24)
    compiled = fxquant.compile(model, [batch], policies.best(4, 6))
    plain = fxquant.compile(model, [batch], policies.minmax(4, 6))
    exact = model(batch)
    assert relative_error(compiled(batch), exact) < relative_error(plain(batch), exact)


def test_the_command_line_has_its_options(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--weight-bits", "4", "--act-bits", "6", "--effort", "minutes", "--full"]
    assert main(["policies", "best", *arguments]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert read_policy(tmp_path / "mine.yaml") == policies.best(4, 6, "minutes", full=True)
    assert main(["policies", "ptq4vit", "--effort", "hours"]) == 2
    assert "preset ptq4vit has no effort: best take it" in capsys.readouterr().err
