"""The integer-only form: no float between the first and the last code, and the same codes."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxquant
from fxquant import Policy, Rule, TensorSpec, policies
from fxquant.backends.integer import float_operations, lower_to_integer
from fxquant.backends.integer.lowerings import LOWERINGS
from fxquant.backends.integer.modules import FromCodes, IntLinear, IntMatmul
from fxquant.config.spec import Granularity, ObserverKind, Scheme
from fxquant.config.vocabulary import Arg, OpKind
from fxquant.demo.glyphs import GlyphDataset
from fxquant.demo.models import build as shipped
from fxquant.errors import LoweringError
from fxquant.quantizers import LogQuantizer
from tests.helpers.integer_only import Ends, Windows, assert_same_codes, compiled, full, images
from tests.helpers.refusals import refused


def heads() -> Policy:
    spec = TensorSpec(bits=8, granularity=Granularity.HEAD)
    return policies.w8a8(full=True).with_rules(Rule(op=OpKind.MATMUL, spec=spec))


def twins() -> Policy:
    spec = TensorSpec(bits=6, scheme=Scheme.TWIN_UNIFORM)
    rules = (Rule(fed_by=name, spec=spec) for name in ("softmax", "gelu"))
    return policies.w8a8(full=True).with_rules(*rules)


def softmax(scheme: str) -> Policy:
    spec = TensorSpec(bits=5, scheme=Scheme(scheme), observer=ObserverKind.MSE)
    return policies.w8a8(full=True).with_rules(Rule(fed_by="softmax", spec=spec))


def four_bits() -> Policy:
    return Policy(name="w4a4", rules=(*policies.elementwise_rules(4), *policies.minmax(4, 4).rules))


def twelve_bits() -> Policy:
    rules = (*policies.elementwise_rules(12), *policies.minmax(8, 12).rules)
    return Policy(name="w8a12", rules=rules)


POLICIES = {
    "w8a8": policies.w8a8(full=True),
    "heads": heads(),
    "twins": twins(),
    **{scheme: softmax(scheme) for scheme in ("dynamic_focusing", "log2", "adalog")},
    "w4a4": four_bits(),
    "w8a12": twelve_bits(),
}


@pytest.mark.parametrize("name", POLICIES)
def test_codes_are_those_of_the_simulation(name: str) -> None:
    qm = full() if name == "w8a8" else compiled(POLICIES[name])
    lowered = qm.lower("integer", integer_only=True)
    assert_same_codes(qm, lowered, images(3))
    assert float_operations(lowered, images(1)) == []


def test_a_wrong_unit_is_noticed() -> None:
    lowered = full().lower("integer")
    lowered.integer.norm2_codes.scaled.factor.mul_(99).div_(100, rounding_mode="floor")
    with pytest.raises(AssertionError, match=r"fc1__input: "):
        assert_same_codes(full(), lowered, images(3))


# The proof


def test_nothing_is_computed_in_float_between_the_codes() -> None:
    lowered = full().lower("integer")
    assert lowered.meta["float_because"] == ""
    assert float_operations(lowered, images(2)) == []


@pytest.mark.parametrize(
    "options", [{"integer_only": False}, {"float_products": True}], ids=["glue", "products"]
)
def test_the_proof_fails_where_there_are_floats(options: dict[str, bool]) -> None:
    found = float_operations(full().lower("integer", **options), images(2))
    assert len(found) > 20 and any("mm" in name for name in found)


def test_one_float_operation_is_enough_to_fail_the_proof() -> None:
    lowered = full().lower("integer")

    class Detour(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, acc: Tensor) -> Tensor:
            return self.inner(acc.to(torch.float64).to(acc.dtype))

    lowered.integer.q_codes = Detour(lowered.integer.q_codes)
    assert float_operations(lowered, images(1)) == ["aten._to_copy.default"] * 2


def test_a_network_without_integers_proves_nothing() -> None:
    with pytest.raises(ValueError, match="computes no integers"):
        float_operations(nn.Linear(4, 4), torch.ones(1, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glyph_vit", "glyph_swin"])
def test_the_shipped_models_run_integer_only(name: str) -> None:
    calibration = torch.stack([image for image, _ in GlyphDataset("calib", 8)])
    qm = fxquant.compile(shipped(name), [calibration], policies.w8a8(full=True))
    lowered = qm.lower("integer", integer_only=True)
    assert float_operations(lowered, calibration[:1]) == []
    assert_same_codes(qm, lowered, calibration[:2])


# The two carriers, batches, files


def test_floats_carry_the_very_same_integers() -> None:
    whole, carried = (full().lower("integer", float_products=on) for on in (False, True))
    assert torch.equal(whole(images(5)), carried(images(5)))


def test_any_batch_gives_the_same_values() -> None:
    lowered = full().lower("integer")
    together = lowered(images(5))
    assert torch.equal(torch.cat([lowered(images(5)[i : i + 1]) for i in range(5)]), together)


def test_a_loaded_model_lowers_the_same(tmp_path) -> None:  # type: ignore[no-untyped-def]
    full().save(tmp_path)
    loaded = fxquant.load(tmp_path)
    assert loaded.plan == full().plan
    lowered = loaded.lower("integer", integer_only=True)
    assert torch.equal(lowered(images(3)), full().lower("integer")(images(3)))


# What is not integer-only


def test_other_policies_are_lowered_as_before() -> None:
    qm = compiled(policies.w8a8())
    lowered = qm.lower("integer")
    assert lowered.meta["float_because"] == "nothing between its products is quantized"
    assert any(isinstance(module, IntLinear) for module in lowered.modules())
    assert not any(isinstance(module, FromCodes) for module in lowered.modules())


def test_elementwise_quantizers_are_kept_where_the_rest_is_float() -> None:
    lowered = full().lower("integer", integer_only=False)
    with torch.no_grad():
        simulated = full()(images(4))
    assert float((lowered(images(4)) - simulated).abs().max()) < 0.05 * float(simulated.abs().max())
    assert any(isinstance(module, FromCodes) for module in lowered.modules())


def without(**condition: object) -> Policy:
    return policies.w8a8(full=True).with_rules(Rule(spec=None, **condition))  # type: ignore[arg-type]


REFUSALS = {
    "a softmax": (
        lambda: compiled(without(op=OpKind.SOFTMAX)),
        "softmax reads a value that is not",
    ),
    "a sum": (lambda: compiled(without(op=OpKind.ADD, arg=Arg.LHS)), "add has an operand that is"),
    "a weight": (lambda: compiled(without(path="fc1", arg=Arg.WEIGHT)), "fc1 has an operand"),
    "a last linear": (lambda: compiled(without(path="head")), "head reads a value that is not"),
    "a function": (lambda: compiled(full_(), Ends(torch.exp)), "exp: exp has no integer form"),
    "a square": (lambda: compiled(full_(), Ends(lambda x: x * x)), "mul has no integer form"),
    "a padding": (
        lambda: compiled(full_(), Ends(lambda x: functional.pad(x[..., :15], (0, 1), value=2.0))),
        "pads with something else than zero",
    ),
    "a factor": (
        lambda: compiled(full_(), Ends(lambda x: torch.add(x, x, alpha=2))),
        "does not add two tensors as they are",
    ),
    "a number": (
        lambda: compiled(full_(), Ends(lambda x: x + 1.5)),
        "does not add two tensors as they are",
    ),
}


def full_() -> Policy:
    return policies.w8a8(full=True)


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_expressed_is_refused_and_named(name: str) -> None:
    make, reason = REFUSALS[name]
    qm = make()
    with pytest.raises(LoweringError, match=f"no integer-only form: .*{reason}"):
        qm.lower("integer", integer_only=True)
    lowered = qm.lower("integer")
    assert reason in lowered.meta["float_because"]
    with torch.no_grad():  # as before, with floats between
        torch.testing.assert_close(lowered(images(2)), qm(images(2)), rtol=0.1, atol=0.1)


def test_a_row_without_requantization_is_lowered_with_floats_between_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    qm = compiled(softmax("log2"))
    exact = qm.lower("integer")
    assert exact.meta["float_because"] == ""
    monkeypatch.setitem(LOWERINGS, LogQuantizer, replace(LOWERINGS[LogQuantizer], requantize=None))
    reason = r"softmax yields integers, .* no requantization of them to codes of LogQuantizer"
    with pytest.raises(LoweringError, match=f"no integer-only form: .*{reason}"):
        qm.lower("integer", integer_only=True)
    lowered = qm.lower("integer")
    assert re.search(reason, lowered.meta["float_because"])
    assert any(isinstance(module, IntMatmul) for module in lowered.modules())
    with torch.no_grad():
        torch.testing.assert_close(lowered(images(2)), qm(images(2)), rtol=0.1, atol=0.1)


def test_functions_before_the_first_and_behind_the_last_product_may_be_float() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Windows()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            out = self.inner(torch.exp(-x))
            return out.exp() / 2, out

    qm = compiled(full_(), Wrapped())
    lowered = qm.lower("integer", integer_only=True)
    assert float_operations(lowered, images(2)) == []
    with torch.no_grad():
        for ours, theirs in zip(lowered(images(3)), qm(images(3)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.1)


def test_the_other_backends_take_no_such_options() -> None:
    text = "no flag 'integer_only', which belongs to backend integer"
    with refused(LoweringError, text, got="integer_only", expected=()):
        full().lower("inductor", integer_only=True)


def test_lowering_changes_nothing_in_the_model() -> None:
    qm = full()
    before = copy.deepcopy(qm.graph_module)
    lower_to_integer(qm.graph_module)
    assert str(before.graph) == str(qm.graph_module.graph)
    assert torch.equal(before(images(2)), qm(images(2)))
