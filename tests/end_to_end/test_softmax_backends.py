"""Schemes for what softmax gives in the backends and on disk: the simulation's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxquant
from fxquant import Rule
from fxquant.backends.integer.log import LogFromCodes, LogOperand, LogRequantize, LogToCodes
from fxquant.backends.onnx_qdq import TARGETS, make_session
from fxquant.backends.onnx_qdq.lowerings import rewrite_quantizers
from fxquant.config.spec import Scheme
from fxquant.errors import LoweringError
from fxquant.quantizers import DynamicFocusingQuantizer, LogQuantizer, largest_start
from fxquant.testing import Block, images, seeded, tokens
from tests.helpers.agreement import assert_same_codes
from tests.helpers.integer_helpers import assert_integer_equals_simulation
from tests.helpers.refusals import refused
from tests.helpers.softmax_nets import NETS, SCHEMES, compiled, found, policy
from tests.helpers.through import through, with_neighbours

LOGS = [Scheme.LOG2, Scheme.ADALOG]


# Integer kernels


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("net", NETS)
def test_integer_codes_and_outputs_are_the_simulations(net: str, scheme: Scheme, bits: int) -> None:
    model = compiled(net, scheme, bits)
    assert len(found(model)) == (1 if net == "block" else 2)
    lowered = model.lower("integer")
    assert_integer_equals_simulation(model.graph_module, lowered, tokens(5))
    assert_integer_equals_simulation(model.graph_module, lowered, tokens(1))


@given(bits=st.integers(2, 8), pair=st.sampled_from([(1, 1), (1, 2), (2, 3), (3, 4), (1, 16)]))
def test_logarithmic_codes_are_decoded_to_whole_numbers(bits: int, pair: tuple[int, int]) -> None:
    quantizer = LogQuantizer(torch.tensor(0.37), bits=bits, n=pair[0], d=pair[1])
    side = LogOperand(quantizer)
    codes = torch.arange(quantizer.zero_code + 1, dtype=torch.uint8)
    ((operand, shift),) = side(codes)
    assert shift == 0 and operand.zero_point is None
    assert operand.codes.tolist() == quantizer.magnitudes
    assert operand.codes.dtype == (torch.uint8 if side.bound < 256 else torch.int32)
    assert int(operand.codes.max()) == side.bound
    values = operand.codes.double() * side.scale.double()
    torch.testing.assert_close(LogFromCodes(quantizer)(codes).double(), values, rtol=1e-6, atol=0)


@given(
    bits=st.integers(2, 8),
    pair=st.sampled_from([(1, 1), (2, 3), (1, 16)]),
    unit=st.floats(1e-7, 0.1),
    seed=st.integers(0, 1000),
)
def test_accumulators_become_the_codes_of_their_values(
    bits: int, pair: tuple[int, int], unit: float, seed: int
) -> None:
    quantizer = LogQuantizer(torch.tensor(0.9), bits=bits, n=pair[0], d=pair[1])
    generator = torch.Generator().manual_seed(seed)
    acc = torch.randint(-5, int(1.5 / unit) + 10, (300,), generator=generator)
    codes = LogRequantize(quantizer, torch.tensor(unit, dtype=torch.float64) / 0.9)(acc)
    exact = quantizer.double()
    exact.scale = torch.tensor(0.9, dtype=torch.float64)
    wrong = codes != exact.quantize(acc.double() * unit)
    assert not bool(wrong.any()) or (unit > 1e-3 and int(wrong.sum()) <= 3)  # on a border itself


def test_a_factor_that_is_not_positive_is_refused() -> None:
    quantizer = LogQuantizer(torch.tensor(0.9), bits=4, n=1, d=1)
    for ratio in (torch.tensor(-0.1), torch.tensor([0.1, 0.2])):
        factor, text = ratio.double(), "one unit and a positive factor"
        with refused(LoweringError, text, got=factor, expected="one positive factor"):
            LogRequantize(quantizer, factor)


@pytest.mark.parametrize("scheme", LOGS)
def test_a_float_operand_gets_the_values_of_the_codes(scheme: Scheme) -> None:
    rule = Rule(op="matmul", arg="rhs", spec=None)
    recipe = policy(scheme, 4).with_rules(rule)
    model = fxquant.compile(seeded(Block()), [tokens(6)], recipe)
    lowered = model.lower("integer")
    kinds = [type(m) for m in lowered.modules()]
    assert kinds.count(LogFromCodes) == kinds.count(LogToCodes) == 1
    assert_integer_equals_simulation(model.graph_module, lowered, tokens(5))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [Scheme.ADALOG, Scheme.DYNAMIC_FOCUSING])
def test_the_compiled_form_gives_the_integer_results(scheme: Scheme) -> None:
    model = compiled("block", scheme, 4)
    assert torch.equal(model.lower("inductor")(tokens(5)), model.lower("integer")(tokens(5)))


# ONNX


@pytest.mark.parametrize(("net", "bits"), [("block", 4), ("sharp", 2), ("even", 4), ("even", 8)])
def test_onnxruntime_runs_the_interval_on_integer_kernels(
    net: str, bits: int, tmp_path: Path
) -> None:
    model = compiled(net, Scheme.DYNAMIC_FOCUSING, bits)
    exported = model.export_onnx(tmp_path / "m.onnx")
    assert sum(exported.fused.values()) == (8 if net == "block" else 3)
    assert exported.unfused == ()
    session = make_session(exported.path)
    for batch in (tokens(5), tokens(1)):
        result = torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])
        torch.testing.assert_close(result, model(batch), rtol=1e-3, atol=1e-3)
    assert_same_codes(model, exported.path, tokens(5))
    assert_same_codes(model, exported.path, 3 * tokens(5))


def test_products_fuse_for_every_target(tmp_path: Path) -> None:
    model = compiled("even", Scheme.DYNAMIC_FOCUSING, 4)
    assert any(q.start for q in found(model).values())
    for target in TARGETS:
        assert model.export_onnx(tmp_path / "m.onnx", target=target).unfused == ()


@given(bits=st.integers(2, 8), scale=st.floats(1e-6, 1e3), share=st.floats(0, 1))
def test_a_clip_and_a_uniform_quantizer_give_the_same_value_to_the_last_bit(
    bits: int, scale: float, share: float
) -> None:
    start = round(share * largest_start(bits))
    own = DynamicFocusingQuantizer(torch.tensor(scale), start=start, bits=bits)
    gm = through(own)
    borders = torch.arange(-3, 2 * (start + 2**bits) + 5) / 2 * own.scale
    x = with_neighbours(borders)
    expected = gm(x)
    assert rewrite_quantizers(gm) == ()
    gm.recompile()
    assert not isinstance(gm.get_submodule("quant.linear__input"), DynamicFocusingQuantizer)
    assert torch.equal(gm(x), expected)


@pytest.mark.parametrize("scheme", LOGS)
def test_onnx_has_no_logarithmic_form(scheme: Scheme, tmp_path: Path) -> None:
    with refused(LoweringError, edge="attn_matmul_1__lhs", got="LogQuantizer") as caught:
        compiled("block", scheme, 4).export_onnx(tmp_path / "m.onnx")
    message = str(caught.value)
    assert message.startswith("attn_matmul_1__lhs (")
    assert f"has no form of LogQuantizer (scheme {scheme}); it has one of schemes" in message
    assert "QuantizeLinear is uniform" in message and "dynamic_focusing" in message
    assert not (tmp_path / "m.onnx").exists()


# On disk


@pytest.mark.parametrize("scheme", SCHEMES)
def test_saving_and_loading_keeps_every_number(scheme: Scheme, tmp_path: Path) -> None:
    model = compiled("even", scheme, 4)
    model.save(tmp_path)
    again = fxquant.load(tmp_path)
    assert torch.equal(again(tokens(5)), model(tokens(5)))
    assert torch.equal(again.lower("integer")(tokens(5)), model.lower("integer")(tokens(5)))
    assert again.plan == model.plan


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_swin_transformer(swin: nn.Module, scheme: Scheme, tmp_path: Path) -> None:
    model = fxquant.compile(swin, [images(4, 32)], policy(scheme, 4))
    assert len(found(model)) == 2
    lowered = model.lower("integer")
    assert_integer_equals_simulation(model.graph_module, lowered, images(5, 32))
    if scheme is Scheme.DYNAMIC_FOCUSING:
        exported = model.export_onnx(tmp_path / "m.onnx")
        assert exported.unfused == ()
        assert_same_codes(model, exported.path, images(5, 32))
