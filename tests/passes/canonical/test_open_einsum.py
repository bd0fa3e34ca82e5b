"""OpenEinsum: what is a product becomes one, the rest stays and says why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxquant.graph.capture import capture
from fxquant.passes import DropNoOps, FoldConstants, OpenEinsum, ToLinear, run_passes
from fxquant.testing import DIM, TOKENS, assert_same_function, op_names, seeded, tokens


class Einsum(nn.Module):
    """An einsum of the tokens with a parameter (letters without b), or with themselves."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation
        self.weight = (
            nn.Parameter(torch.randn(DIM, DIM))
            if "b" not in equation.split(",")[1].split("->", maxsplit=1)[0]
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, x, x if self.weight is None else self.weight)


EINSUMS = {
    "bnc,bmc->bnm": "matmul",
    "bnc,cd->bnd": "linear",
    "bnc,dc->bdn": "linear",
    "bnc,bnd->bcd": "matmul",
    "bnc,bmc->bmn": "matmul",
}


@pytest.mark.parametrize("equation", EINSUMS)
def test_an_einsum_that_is_a_product_becomes_one(equation: str) -> None:
    gm = capture(seeded(Einsum(equation)), tokens())
    model = seeded(Einsum(equation))
    run_passes(gm, [DropNoOps(), OpenEinsum(), FoldConstants(), ToLinear()])
    assert EINSUMS[equation] in op_names(gm) and "einsum" not in op_names(gm)
    assert_same_function(gm, model, tokens())
    assert run_passes(gm, [OpenEinsum()])["OpenEinsum"].changed == 0


@pytest.mark.parametrize(
    ("equation", "reason"),
    [
        ("bnc,bmc->b", "sums an axis of one operand alone"),
        ("bnc,bnc->bnc", "sums over nothing"),
        ("...c,cd->...d", "ellipsis"),
        ("bnn,bmc->bmc", "repeats a letter"),
    ],
)
def test_an_einsum_that_is_no_product_stays_and_says_why(equation: str, reason: str) -> None:
    model = Einsum(equation)
    gm = capture(seeded(model), tokens() if "nn" not in equation else tokens()[:, :, :TOKENS])
    (skip,) = run_passes(gm, [OpenEinsum()])["OpenEinsum"].notes
    assert reason in skip.reason and "einsum" in op_names(gm)
