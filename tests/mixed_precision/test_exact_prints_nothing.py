"""The solver of exact allocation prints nothing on stdout, where users read our own tables."""

from __future__ import annotations

import ctypes
import os

import numpy as np
import pytest
from scipy.optimize import milp

from fxquant.config.allocation import Budget, Method
from fxquant.mixed_precision.allocate import exact
from fxquant.mixed_precision.allocate.plan import allocate
from fxquant.mixed_precision.allocate.problem import Group, Problem

WIDTHS = (2, 3, 4, 5, 6, 8)


def vit_like(groups: int = 50) -> Problem:
    """A problem with losses and numbers of values as in a vision transformer."""
    generator = np.random.default_rng(9)
    scales = 10 ** generator.uniform(-3, 0, (groups, 1))
    steps = 4.0 ** -np.arange(len(WIDTHS))
    losses = scales * steps * generator.uniform(0.5, 1.6, (groups, len(WIDTHS)))
    values = generator.choice([75_648, 147_456, 302_592, 384_000, 443_520, 589_824], groups)
    return Problem(
        widths=WIDTHS,
        groups=tuple(
            Group(
                name=f"g{i}",
                edges=(f"g{i}",),
                is_weight=bool(i % 2),
                values=int(values[i]),
                losses=tuple(losses[i].tolist()),
            )
            for i in range(groups)
        ),
    )


# Without the redirection, HiGHS 1.12 (scipy 1.17) prints debug lines on these three.
@pytest.mark.parametrize("mean_bits", [3.25, 3.75, 6.75])
def test_solving_prints_nothing(mean_bits: float, capfd: pytest.CaptureFixture[str]) -> None:
    allocate(vit_like(), Budget(mean_bits=mean_bits), Method.EXACT)
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == ""


def test_what_a_solver_prints_in_c_is_discarded(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the version of HiGHS prints, such as its lines on new integer solutions."""

    def printing_milp(*args: object, **options: object) -> object:
        os.write(1, b"HighsMipSolverData::transformNewIntegerFeasibleSolution\n")
        return milp(*args, **options)

    monkeypatch.setattr(exact, "milp", printing_milp)
    plan = allocate(vit_like(8), Budget(mean_bits=5), Method.EXACT)
    assert plan.costs["mean_bits"] <= 5 and capfd.readouterr().out == ""
