"""Power-of-two scales: fits, searches, training, folds of biases and both backends keep them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fxquant
from fxquant import Policy, Rule, policies
from fxquant.backends.integer.requantize import multiplier
from fxquant.backends.onnx_qdq import make_session
from fxquant.config.recovery import WeightTraining
from fxquant.config.spec import Scheme, TensorSpec
from fxquant.config.vocabulary import Arg
from fxquant.errors import CalibrationError, FileFormatError
from fxquant.passes import QuantizeBias, run_passes
from fxquant.quantizers import FAMILIES, PowerOfTwoQuantizer, Quantizer, UniformQuantizer
from fxquant.testing import DIM, Block, relative_error, seeded, tokens
from tests.helpers import stages
from tests.helpers.agreement import assert_same_codes
from tests.helpers.quantizer_cases import RangeCase, uniform_cases
from tests.helpers.refusals import refused
from tests.helpers.towers import BATCH, THREE, Tower, reconstruct

POWER = Scheme.POWER_OF_TWO
EIGHT = TensorSpec(scheme=POWER)


def is_power(scale: Tensor) -> bool:
    return bool((torch.frexp(scale)[0] == 0.5).all())


def of_powers(policy: Policy) -> Policy:
    """The policy with power-of-two scales wherever it has a uniform quantizer."""
    rules = tuple(
        rule
        if rule.spec is None or rule.spec.scheme is not Scheme.UNIFORM
        else replace(rule, spec=replace(rule.spec, scheme=POWER))
        for rule in policy.rules
    )
    return replace(policy, name=f"{policy.name}_power_of_two", rules=rules)


def assert_scales_are_powers(model: fxquant.CompiledModel) -> None:
    """Scales of all edges that have the scheme, of which there are some."""
    names = {e.quantizer for e in model.plan if e.spec is not None and e.spec.scheme is POWER}
    assert names
    for name in names:
        quantizer = model.graph_module.get_submodule(str(name))
        assert isinstance(quantizer, PowerOfTwoQuantizer) and is_power(quantizer.scale)


@given(uniform_cases(POWER))
def test_the_range_is_covered_by_the_least_power(case: RangeCase) -> None:
    spec = TensorSpec(bits=case.quantizer.bits, symmetric=case.quantizer.signed)
    plain = UniformQuantizer.from_range(case.lo, case.hi, spec, case.quantizer.axis)
    assert is_power(case.quantizer.scale)
    ratio = case.quantizer.scale / plain.scale
    assert bool(((ratio >= 1) & (ratio < 2)).all())
    zeros = torch.zeros_like(case.x)
    assert torch.equal(case.quantizer(zeros), zeros)
    assert bool((case.quantizer.zero_point % 2 == 0).all())
    least, largest = case.quantizer.code_range
    assert bool((least <= case.quantizer.zero_point).all())
    assert bool((case.quantizer.zero_point <= largest).all())


@given(st.floats(2.0**-60, 2.0**60), st.integers(-60, 60))
def test_scales_are_rounded_up_to_cover_and_to_the_nearest_to_train(
    scale: float, exponent: int
) -> None:
    free = torch.tensor(scale).requires_grad_()
    least, nearest = PowerOfTwoQuantizer.least_scale(free), PowerOfTwoQuantizer.trained_scale(free)
    assert free <= least < 2 * free
    assert 0.7 < float((nearest / free).detach()) < 1.42
    assert is_power(least.detach()) and is_power(nearest.detach())
    nearest.backward()
    assert free.grad is not None and 0.7 < float(free.grad) < 1.42
    power = torch.tensor(2.0**exponent)
    assert PowerOfTwoQuantizer.least_scale(power) == power
    assert PowerOfTwoQuantizer.trained_scale(power) == power


def test_other_scales_are_refused() -> None:
    zero = torch.tensor(0.0)
    PowerOfTwoQuantizer(torch.tensor(0.25), zero, bits=8, signed=True, axis=None)
    with refused(CalibrationError, "not a power of two", expected="powers of two") as caught:
        PowerOfTwoQuantizer(torch.tensor(0.3), zero, bits=8, signed=True, axis=None)
    assert caught.value.got == torch.tensor(0.3)
    with refused(CalibrationError, "not even", expected="even") as caught:
        PowerOfTwoQuantizer(torch.tensor(0.25), zero + 3, bits=8, signed=False, axis=None)
    assert caught.value.got == 3


def test_the_least_squares_fit_clips_where_a_smaller_power_loses_less() -> None:
    spec = TensorSpec(bits=4, scheme=POWER, observer="mse")
    x = torch.cat([torch.rand(10_000), torch.tensor([1.9])])
    (fitted,) = (q for q in fitted_on(x, spec) if isinstance(q, PowerOfTwoQuantizer))
    covering = FAMILIES[POWER].fit(torch.tensor(0.0), torch.tensor(1.9), spec, None)
    assert fitted.scale < covering.scale
    assert (fitted(x) - x).square().mean() < (covering(x) - x).square().mean()


def fitted_on(x: Tensor, spec: TensorSpec) -> list[Quantizer]:
    from fxquant.observers import make_observer

    observer = make_observer(spec, axis=None, where="here")
    observer(x)
    return [observer.fit()]


@pytest.mark.parametrize("preset", ["w8a8_full", "ptq4vit", "mptq_vit"])
def test_presets_keep_powers_in_every_backend(preset: str, tmp_path: Path) -> None:
    widths = {} if preset == "w8a8_full" else {"weight_bits": 6, "act_bits": 6}
    x = tokens(8)
    policy = of_powers(policies.preset(preset, **widths))
    model = fxquant.compile(seeded(Block()), [x], policy)
    assert_scales_are_powers(model)
    assert relative_error(model(x), seeded(Block())(x)) < 0.1
    assert "2^n" in str(model.report)
    assert relative_error(model.lower("integer")(x), model(x)) < 1e-5
    exported = model.export_onnx(tmp_path / "m.onnx")
    assert_same_codes(model, exported.path, x)
    model.save(tmp_path)
    assert torch.equal(fxquant.load(tmp_path)(x), model(x))


@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_exact_ties_go_to_one_code_in_every_backend(observer: str, tmp_path: Path) -> None:
    """Per head and asymmetric, on images and weights of few bits, so that ties are common."""
    heads = TensorSpec(bits=4, scheme=POWER, granularity="head", observer=observer)
    rest = TensorSpec(bits=4, scheme=POWER, observer=observer)
    weight = TensorSpec(bits=4, scheme=POWER, symmetric=True, granularity="channel")
    rules = Rule(arg="weight", spec=weight), Rule(op="matmul", spec=heads), Rule(spec=rest)
    x = (tokens(16) * 8).round() / 8
    model = fxquant.compile(seeded(Block()), [x], Policy(name="ties", rules=rules))
    points = [q.zero_point for q in model.graph_module.modules() if isinstance(q, UniformQuantizer)]
    assert any(bool((point % 4 == 2).any()) for point in points)
    assert torch.equal(model.lower("integer")(x), model(x))
    session = make_session(model.export_onnx(tmp_path / "m.onnx").path)
    (outputs,) = session.run(None, {"images": x.numpy()})
    assert relative_error(torch.from_numpy(outputs), model(x)) < 1e-5


class Scores(torch.nn.Module):
    """Scores of two heads that read the tokens themselves."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        scores: Tensor = heads @ heads.transpose(-1, -2)
        return scores


@pytest.mark.parametrize("scheme", [Scheme.UNIFORM, POWER])
def test_ties_at_a_zero_point_per_head_go_the_same_way_in_onnx(
    scheme: Scheme, tmp_path: Path
) -> None:
    """Every second value is a tie; a sum with an odd zero_point would round it the other way."""
    spec = TensorSpec(bits=4, scheme=scheme, granularity="head")
    x = (tokens(16) * 8).round() / 16
    policy = Policy(name="ties", rules=(Rule(spec=spec),))
    model = fxquant.compile(Scores().eval(), [x], policy)
    for module in model.graph_module.modules():
        if isinstance(module, UniformQuantizer):
            module.scale.fill_(2.0**-3)
            module.zero_point.fill_(7.0 if scheme is Scheme.UNIFORM else 6.0)
    session = make_session(model.export_onnx(tmp_path / "m.onnx").path)
    (outputs,) = session.run(None, {"images": x.numpy()})
    assert relative_error(torch.from_numpy(outputs), model(x)) < 1e-5


def test_every_step_to_codes_is_a_shift_in_integers() -> None:
    policy = of_powers(policies.w8a8(full=True))
    lowered = fxquant.compile(seeded(Block()), [tokens(8)], policy).lower("integer")
    assert lowered.meta["float_because"] == ""
    # Norms and softmax divide by a root and a sum; all else goes from unit to unit by powers.
    factors = [
        (name, buffer)
        for name, buffer in lowered.named_buffers()
        if name.endswith("scaled.factor") and "norm" not in name and "softmax" not in name
    ]
    assert len(factors) >= 5
    for name, factor in factors:
        assert bool((factor & (factor - 1) == 0).all()), name
    by = multiplier(torch.tensor(2.0**-9, dtype=torch.float64), 1000)
    assert int(by.factor) & (int(by.factor) - 1) == 0


@pytest.mark.parametrize(
    "weights",
    [WeightTraining.STRAIGHT_THROUGH, WeightTraining.ADAROUND, WeightTraining.LOW_RANK],
)
def test_training_moves_scales_from_power_to_power(weights: WeightTraining) -> None:
    rules = Rule(arg=Arg.WEIGHT, spec=replace(THREE, scheme=POWER)), Rule(spec=EIGHT)
    gm = stages.frozen(*rules, model=Tower(), data=[BATCH])
    result = reconstruct(gm, weights=weights, scale_rate=5e-2)
    assert result.changed >= 1
    losses = [item for item in result.comparisons if item.measure.endswith("loss")]
    assert len(losses) == result.changed and all(item.error_ratio < 1 for item in losses)
    scales = [q.scale for q in gm.modules() if isinstance(q, UniformQuantizer)]
    assert scales and all(map(is_power, scales))


def test_room_for_a_large_bias_is_made_in_powers() -> None:
    model = seeded(torch.nn.Linear(DIM, 8))
    with torch.no_grad():
        model.weight[3] *= 1e-12
        model.bias[3] = 5.0
    rules = of_powers(policies.w8a8()).rules
    gm = stages.frozen(*rules, model=model, data=[tokens()], seed=False)
    before = [q.scale.clone() for q in gm.modules() if isinstance(q, PowerOfTwoQuantizer)]
    run_passes(gm, [QuantizeBias()])
    after = [q.scale for q in gm.modules() if isinstance(q, PowerOfTwoQuantizer)]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(is_power(scale) for scale in after)


def test_a_saved_scale_that_is_not_a_power_is_refused(tmp_path: Path) -> None:
    model = fxquant.compile(seeded(Block()), [tokens()], of_powers(policies.w8a8()))
    quantizers = [q for q in model.graph_module.modules() if isinstance(q, PowerOfTwoQuantizer)]
    quantizers[0].scale.mul_(1.5)
    model.save(tmp_path)
    with refused(FileFormatError, "a scale is not a power of two") as caught:
        fxquant.load(tmp_path)
    (name,) = (n for n, q in model.graph_module.named_modules() if q is quantizers[0])
    assert caught.value.edge == name


def test_a_range_at_the_end_of_float32_is_fitted() -> None:
    spec = TensorSpec(bits=2, scheme=POWER, symmetric=True)
    fitted = FAMILIES[POWER].fit(torch.tensor(-3e38), torch.tensor(3e38), spec, None)
    assert fitted.scale == 2.0**127
