"""Quantizers and weights while they are trained, and the images that training sees."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxquant.config.spec import TensorSpec
from fxquant.quantizers import (
    FAMILIES,
    DynamicFocusingQuantizer,
    Quantizer,
    TwinUniformQuantizer,
    UniformQuantizer,
)
from fxquant.quantizers.ops import broadcast
from fxquant.quantizers.trained import TrainedQuantizer, draw_mask
from fxquant.reconstruction.curriculum import Curriculum
from fxquant.reconstruction.weights import AdaRound, LowRankWeight, StraightThrough
from tests.helpers.towers import THREE


def trained_form(quantizer: Quantizer, drop: float) -> TrainedQuantizer | None:
    kinds = (f for f in FAMILIES.values() if f.quantizer is type(quantizer))
    form = next(kinds).trained
    return None if form is None else form(quantizer, drop)


def quantizers() -> list[Quantizer]:
    spec = TensorSpec(bits=4)
    lo, hi = torch.tensor(-0.7), torch.tensor(2.0)
    head = UniformQuantizer(
        torch.tensor([0.1, 0.3, 0.2]), torch.tensor([4.0, 7.0, 9.0]), bits=4, signed=False, axis=1
    )
    signed = UniformQuantizer(
        torch.tensor([0.1, 0.3, 0.2]), torch.zeros(3), bits=4, signed=True, axis=1
    )
    return [
        UniformQuantizer.from_range(lo, hi, spec, None),
        head,
        DynamicFocusingQuantizer(torch.tensor(0.1), start=2, bits=4),
        TwinUniformQuantizer(torch.tensor(0.05), shift=2, bits=4, two_sided=True),
        TwinUniformQuantizer(torch.tensor(0.02), shift=3, bits=4, two_sided=False),
        signed,
    ]


@pytest.mark.parametrize("start", quantizers(), ids=lambda q: type(q).__name__)
def test_what_is_trained_starts_where_the_quantizer_is(start: Quantizer) -> None:
    form = trained_form(start, 0.5)
    assert form is not None
    x = torch.randn(4, 3, 50, generator=torch.Generator().manual_seed(0))
    form.eval()
    assert torch.allclose(form(x), start(x), atol=1e-6)
    assert torch.equal(form.fitted()(x), start(x))
    form.train()
    left = form(x) == x
    assert 0.3 < float(left.float().mean()) < 0.7


@pytest.mark.parametrize("start", quantizers(), ids=lambda q: type(q).__name__)
def test_the_fitted_quantizer_is_the_trained_one(start: Quantizer) -> None:
    form = trained_form(start, 0.0)
    assert form is not None
    with torch.no_grad():
        for parameter in form.parameters():
            if parameter.requires_grad:
                parameter.add_(0.13)
    x = torch.randn(4, 3, 50, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(form(x), form.fitted()(x), atol=1e-5)


def test_scale_and_zero_point_have_their_gradients() -> None:
    """Where nothing is rounded to another code, differences of the loss are the gradient's."""
    start = UniformQuantizer(torch.tensor(0.25), torch.tensor(3.0), bits=3, signed=False, axis=None)
    form = trained_form(start, 0.0)
    assert form is not None
    x = torch.tensor([-5.0, -2.0, 4.0, 9.0])  # all beyond the range
    (form(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    ends = torch.tensor([-3.0, -3.0, 4.0, 4.0]) * 0.25  # d/dlog(s) = value
    expected = float((ends * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum())
    assert float(form.log_scale.grad) == pytest.approx(expected)
    assert float(form.offset.grad) == pytest.approx(-10 * 0.25 * 7)


def reference(form: Any, x: Tensor, dropped: Tensor) -> Tensor:
    """The trained quantizer in plain operators and float64, by autograd alone."""
    start = form.fitted()  # for its codes, which gradients do not see
    scale = broadcast(
        form._first.double() * form.log_scale.exp(), x.ndim, getattr(start, "axis", None)
    )
    steps = x / scale
    if isinstance(start, TwinUniformQuantizer):
        low = 0.5 - start.levels if start.two_sided else -0.5
        inside = (steps >= low) & (steps <= (start.levels - 0.5) * 2**start.shift)
        codes = (start(x.detach().float()).double() / scale).round().detach()
    else:
        first = form._start
        zero = first.zero_point.double()
        if form.offset.requires_grad:
            zero = zero + form.offset * (first.qmax - first.qmin)
        zero = broadcast(zero + (zero.round() - zero).detach(), x.ndim, first.axis)
        whole = steps.round().detach() + zero
        inside = (whole >= first.qmin) & (whole <= first.qmax)
        codes = whole.clamp(first.qmin, first.qmax) - zero
    near = torch.where(inside, steps + (codes - steps).detach(), codes)
    return torch.where(dropped > 0, x, near * scale)


@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("start", quantizers(), ids=lambda q: type(q).__name__)
def test_gradients_are_those_of_plain_operators(start: Quantizer, drop: float) -> None:
    form = trained_form(start, drop)
    assert form is not None
    with torch.no_grad():
        for parameter in form.parameters():
            parameter.add_(0.06 if parameter.requires_grad else 0)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 3, 50, generator=generator).requires_grad_()
    slope = torch.randn(x.shape, generator=generator)
    form.train()
    torch.manual_seed(5)
    found = form(x)
    (found * slope).sum().backward()
    torch.manual_seed(5)
    dropped = draw_mask(x.detach(), drop) if drop else torch.zeros_like(x)
    twin = copy.deepcopy(form).double()
    twin.zero_grad()
    exact = x.detach().double().requires_grad_()
    wanted = reference(twin, exact, dropped)
    (wanted * slope).sum().backward()
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    assert torch.allclose(x.grad.double(), exact.grad, atol=1e-6)
    for one, two in zip(form.parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        if one.grad is not None:
            assert float(two.grad.abs().max()) > 0.5
            assert torch.allclose(one.grad.double(), two.grad, rtol=1e-3, atol=1e-3)


@given(st.integers(0, 100), st.sampled_from([StraightThrough, AdaRound, LowRankWeight]))
def test_weights_start_at_their_rounding_and_train_to_one(seed: int, kind: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 7, generator=generator)
    start = UniformQuantizer.from_range(weight.amin(1), weight.amax(1), THREE, 0)
    more = {"rank": 2, "generator": generator} if kind is LowRankWeight else {}
    form = kind(weight, start, scales=True, **more).eval()
    assert torch.allclose(form(), start(weight), atol=1e-6)
    with torch.no_grad():
        for parameter in form.parameters():
            parameter.add_(0.2)
    latent, quantizer = form.fitted()
    assert torch.allclose(quantizer(latent), form(), atol=1e-5)


@given(st.integers(2, 200), st.integers(1, 64), st.floats(0.01, 1.0))
def test_a_curriculum_begins_with_the_easy_ones(count: int, batch: int, start: float) -> None:
    plan = Curriculum(count, batch, 100, start, torch.Generator().manual_seed(0))
    losses = torch.randn(count, generator=torch.Generator().manual_seed(1))
    plan.sort(losses)
    for step in (0, 50, 100):
        drawn = plan.draw(step)
        first = max(1, round(start * count))
        assert len(drawn) == len(set(drawn.tolist())) == min(batch, first)
        allowed = max(1, round(plan.share(step) * count))
        assert bool((losses[drawn] <= losses.sort().values[allowed - 1]).all())
    assert plan.share(0) == start
    assert plan.share(100) == pytest.approx(1)


@given(st.integers(1, 400), st.integers(0, 255))
def test_a_mask_drops_its_share(count: int, part: int) -> None:
    mask = draw_mask(torch.zeros(count, 3), part / 256)
    assert mask.shape == (count, 3)
    assert bool(((mask == 0) | (mask == 1)).all())
    expected = 3 * count * part / 256
    spread = (expected * (1 - part / 256)) ** 0.5
    assert abs(float(mask.sum()) - expected) <= 6 * spread + 1e-6


def test_what_is_dropped_passes_with_its_gradient() -> None:
    form = trained_form(quantizers()[0], 0.5)
    assert form is not None
    x = torch.linspace(-9, 9, 999, requires_grad=True)  # most of it beyond the range
    form.train()
    y = form(x)
    y.sum().backward()
    assert x.grad is not None
    beyond = (x < -1) | (x > 3)
    assert torch.equal(x.grad[beyond] == 1, y[beyond] == x[beyond])
    assert bool((x.grad[~beyond & (x > -0.5) & (x < 1.8)] == 1).all())


@pytest.mark.parametrize("start", quantizers(), ids=lambda q: type(q).__name__)
def test_bfloat16_goes_through_with_drops(start: Quantizer) -> None:
    form = trained_form(start, 0.5)
    assert form is not None
    x = torch.randn(4, 3, 50).bfloat16().requires_grad_()
    form.train()
    y = form(x)
    y.sum().backward()
    assert y.dtype == torch.float32
    assert x.grad is not None and bool(x.grad.isfinite().all())


@pytest.mark.parametrize("move", [-0.4, -0.1, 0.1, 0.7])
@pytest.mark.parametrize("start", quantizers()[:3], ids=lambda q: type(q).__name__)
def test_zero_points_stay_among_the_codes_and_come_back(start: Quantizer, move: float) -> None:
    form = trained_form(start, 0.0)
    assert form is not None
    with torch.no_grad():
        form.offset.add_(move)
    x = torch.linspace(-4, 4, 600).reshape(4, 3, 50)
    out = form(x)
    assert torch.allclose(out, form.fitted()(x), atol=1e-5)
    out.square().sum().backward()
    assert bool((form.offset.grad != 0).any()), "values beyond the ends pull at it"
