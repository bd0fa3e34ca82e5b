"""Twin uniform quantizers in the integer backend and on disk: the simulation's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxquant
from fxquant import Policy, Rule, TensorSpec
from fxquant.backends.integer.modules import FromCodes
from fxquant.backends.integer.twin import TwinFromCodes, TwinOperand, TwinToCodes
from fxquant.testing import DIM, Block, seeded, tokens
from tests.helpers.integer_helpers import assert_integer_equals_simulation, code_buffers
from tests.helpers.twin_nets import NETS, compiled, found, twins


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("net", NETS)
def test_integer_codes_and_outputs_are_the_simulations(net: str, bits: int) -> None:
    model = compiled(net, bits, None)
    lowered, x = model.lower("integer"), NETS[net][1](5)
    assert_integer_equals_simulation(model.graph_module, lowered, x)
    assert_integer_equals_simulation(model.graph_module, lowered, x[:1])
    names = {name for name, m in lowered.named_modules() if isinstance(m, TwinToCodes)}
    assert {name.replace("codes.", "quant.") for name in names} == set(found(model)) != set()


def test_a_product_shifts_the_coarse_part_where_codes_pass_eight_bits() -> None:
    """The paper's ``(a_q + b_q 2^m) D_R1``, checked in 64-bit integers."""
    for bits, terms in ((4, 1), (8, 2)):
        model = compiled("block", bits, None)
        quantizer = found(model)["quant.fc2__input"]
        side = TwinOperand(quantizer)
        words = quantizer.quantize(torch.linspace(-1, 40, 500)).to(torch.uint8)
        parts = side(words)
        assert len(parts) == terms
        total = sum(
            (part.codes.long() - (0 if part.zero_point is None else part.zero_point)) << shift
            for part, shift in parts
        )
        assert all(part.codes.dtype in (torch.int8, torch.uint8) for part, _ in parts)
        assert torch.equal(total * quantizer.scale, quantizer.dequantize(words.float()))
        assert total.abs().max() <= side.bound


def test_a_sum_that_passes_int32_is_taken_in_int64() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(40_000, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(functional.gelu(x))

    x = torch.full((2, 40_000), 20.0)
    x[0, :100] = -0.05
    model = fxquant.compile(seeded(Wide()), [x], twins(8))
    lowered = model.lower("integer")
    assert lowered.integer.fc.bias_codes.dtype == torch.int64
    assert_integer_equals_simulation(model.graph_module, lowered, x)


def test_a_float_operand_gets_the_values_of_the_codes() -> None:
    rule = Rule(path="fc2", arg="weight", spec=None)
    model = fxquant.compile(seeded(Block()), [tokens(6)], twins(6).with_rules(rule))
    lowered = model.lower("integer")
    kinds = [type(m) for m in lowered.modules()]
    assert kinds.count(TwinFromCodes) == 1 and FromCodes not in kinds
    assert_integer_equals_simulation(model.graph_module, lowered, tokens(5))


class Table(nn.Module):
    """Attention over a table of values: the twin quantizer's other operand is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(DIM, 3))
        self.mix = nn.Parameter(torch.empty(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(B, N, C)`` to ``(B, N, 3)``."""
        return self.mix @ (x.softmax(-1) @ self.table)


@pytest.mark.parametrize("net", [*NETS, "table"])
def test_saving_and_loading_keeps_every_number(net: str, tmp_path: Path) -> None:
    if net == "table":
        spec = TensorSpec(bits=4, scheme="twin_uniform")
        rules = (Rule(arg="lhs", spec=spec), Rule(spec=TensorSpec()))
        model = fxquant.compile(seeded(Table()), [tokens(6)], Policy(name="t", rules=rules))
        assert len(code_buffers(model.lower("integer"))) == 2  # the twin's words and the table
        assert_integer_equals_simulation(model.graph_module, model.lower("integer"), tokens(5))
    else:
        model = compiled(net, 6, None)
    x = NETS.get(net, NETS["block"])[1](5)
    model.save(tmp_path)
    again = fxquant.load(tmp_path)
    assert torch.equal(again(x), model(x))
    assert torch.equal(again.lower("integer")(x), model.lower("integer")(x))
    assert again.plan == model.plan


@pytest.mark.slow
def test_the_compiled_form_gives_the_integer_results() -> None:
    model = compiled("pair", 8, None)
    assert torch.equal(model.lower("inductor")(tokens(5)), model.lower("integer")(tokens(5)))
