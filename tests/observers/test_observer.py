"""Observers: what they fit, and that neither order nor amount of data matters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fxquant.config.spec import Granularity, ObserverKind, Scheme, TensorSpec
from fxquant.errors import CalibrationError, NonFiniteError
from fxquant.observers.observer import (
    BINS,
    HistogramObserver,
    MinMaxObserver,
    Observer,
    make_observer,
)
from fxquant.observers.ranges import value_range
from fxquant.quantizers import FAMILIES, UniformQuantizer
from tests.helpers.refusals import refused

KINDS = list(ObserverKind)
# One kind is for what a softmax reads, and leaves most of other values out.
ANY_VALUES = [kind for kind in KINDS if kind is not ObserverKind.SOFTMAX]


def observed(spec: TensorSpec, *batches: Tensor, axis: int | None = None) -> Observer:
    observer = make_observer(spec, axis=axis, where="an_edge__input")
    for batch in batches:
        observer(batch)
    return observer


@st.composite
def streams(draw: st.DrawFn) -> list[Tensor]:
    """Batches ``(b, 6, 3)`` whose magnitudes differ by up to 2 ** 40, zero batches included."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    exponents = draw(st.lists(st.integers(-20, 20) | st.none(), min_size=1, max_size=5))
    sizes = draw(st.lists(st.integers(1, 3), min_size=len(exponents), max_size=len(exponents)))
    return [
        torch.randn(size, 6, 3, generator=generator) * (0.0 if e is None else 2.0**e)
        for size, e in zip(sizes, exponents, strict=True)
    ]


def clipped(kind: ObserverKind, percentile: float) -> dict[str, float]:
    """The option of the observer that has it."""
    return {"percentile": percentile} if kind is ObserverKind.PERCENTILE else {}


@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("kind", KINDS)
@given(stream=streams(), symmetric=st.booleans())
def test_the_fit_does_not_depend_on_batches(
    kind: ObserverKind, axis: int | None, stream: list[Tensor], symmetric: bool
) -> None:
    spec = TensorSpec(observer=kind, symmetric=symmetric, **clipped(kind, 90.0))
    whole = observed(spec, torch.cat(stream), axis=axis).fit()
    for order in (stream, stream[::-1]):
        parts = observed(spec, *order, axis=axis).fit()
        assert torch.equal(parts.scale, whole.scale)
        assert torch.equal(parts.zero_point, whole.zero_point)


@pytest.mark.parametrize("scheme", Scheme)
@pytest.mark.parametrize("kind", ANY_VALUES)
@given(stream=streams(), data=st.data())
def test_one_histogram_fits_every_spec(
    kind: ObserverKind, scheme: Scheme, stream: list[Tensor], data: st.DataObject
) -> None:
    """Data seen at one width are fitted at another as if they had been seen at that."""
    if scheme.limits.is_one_sided:
        stream = [batch.abs() for batch in stream]
    kept = make_observer(TensorSpec(), axis=None, where="an_edge__input", histogram=True)
    for batch in stream:
        kept(batch)
    bits = data.draw(st.integers(2, min(8, scheme.limits.max_bits)))
    spec = TensorSpec(bits=bits, observer=kind, scheme=scheme)
    fitted, expected = kept.fit(spec), observed(spec, *stream).fit()
    assert fitted.config() == expected.config()
    pairs = zip(fitted.buffers(), expected.buffers(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    assert kept.fit().bits == 8


def test_candidates_are_not_for_an_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, values = TensorSpec(observer=ObserverKind.MSE), torch.arange(24.0).view(8, 3)
    plain = observed(spec, values, axis=-1).fit()
    family = replace(FAMILIES[spec.scheme], candidates=lambda *_: [])
    monkeypatch.setitem(FAMILIES, spec.scheme, family)
    assert torch.equal(observed(spec, values, axis=-1).fit().scale, plain.scale)


@given(seed=st.integers(0, 1000), bits=st.integers(2, 8), symmetric=st.booleans())
def test_the_range_of_values_themselves_beats_min_max(
    seed: int, bits: int, symmetric: bool
) -> None:
    values = torch.randn(3, 400, generator=torch.Generator().manual_seed(seed)) ** 3
    spec = TensorSpec(bits=bits, symmetric=symmetric)

    def errors(lo: Tensor, hi: Tensor) -> Tensor:
        quantizer = UniformQuantizer.from_range(lo, hi, spec, 0)
        return (quantizer(values) - values).square().sum(1)

    plain = errors(*torch.aminmax(values, dim=1))
    found = errors(*value_range(values, spec))
    assert bool((found <= plain * 1.0001).all())
    if bits <= 3:
        assert float(found.sum()) < 0.95 * float(plain.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_a_power_of_two_is_counted_alike_in_any_order(kind: ObserverKind) -> None:
    # The largest value of a batch lies exactly on the limit of a histogram.
    spec = TensorSpec(observer=kind, **clipped(kind, 60.0))
    batches = [torch.full((4,), 2.0**e) for e in (-40, 0, 60, 100)]
    one, other = observed(spec, *batches).fit(), observed(spec, *batches[::-1]).fit()
    assert torch.equal(one.scale, other.scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", [None, -1, -3])
def test_memory_is_bounded(kind: ObserverKind, axis: int | None) -> None:
    def held(observer: Observer) -> int:
        return sum(t.numel() for t in vars(observer).values() if isinstance(t, Tensor)) + sum(
            t.numel() for t in observer.buffers()
        )

    observer = make_observer(TensorSpec(observer=kind), axis=axis, where="e")
    observer(torch.randn(1, 2, 3, 4))
    first = held(observer)
    for i in range(40):
        observer(torch.randn(8, 2, 3, 4) * 1.5**i)
    assert held(observer) == first
    assert first <= (BINS + 3) * 4


@pytest.mark.parametrize("kind", KINDS)
def test_data_passes_through_unchanged(kind: ObserverKind) -> None:
    x = torch.randn(3, 4)
    assert make_observer(TensorSpec(observer=kind), axis=None, where="e")(x) is x


@given(stream=streams())
def test_min_max_is_the_range_of_the_data(stream: list[Tensor]) -> None:
    observer = observed(TensorSpec(), *stream, axis=-1)
    assert isinstance(observer, MinMaxObserver)
    rows = torch.cat(stream).flatten(0, 1)
    lo, hi = observer.range()
    assert torch.equal(lo, rows.amin(0)) and torch.equal(hi, rows.amax(0))


@given(
    seed=st.integers(0, 1000),
    percentile=st.sampled_from([60.0, 90.0, 99.0, 99.9, 100.0]),
    magnitude=st.integers(-10, 10),
)
def test_percentile_is_the_quantile_of_torch_within_a_bin(
    seed: int, percentile: float, magnitude: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4000, generator=generator) * 3.0**magnitude
    spec = TensorSpec(observer=ObserverKind.PERCENTILE, percentile=percentile)
    lo, hi = observed(spec, *x.split(1000))._fit_range(spec)
    tail = (1 - percentile / 100) / 2
    width = 4 * float(x.abs().max()) / BINS  # limit is at most twice the peak
    for fitted, share, kind in ((lo, tail, "lower"), (hi, 1 - tail, "higher")):
        expected = float(torch.quantile(x.double(), share, interpolation=kind))
        other = "higher" if kind == "lower" else "lower"
        near = float(torch.quantile(x.double(), share, interpolation=other))
        low, high = min(expected, near) - width, max(expected, near) + width
        assert low <= float(fitted) <= high


@given(
    seed=st.integers(0, 1000),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    power=st.sampled_from([1, 3, 5]),
    shift=st.sampled_from([-1.0, 0.0, 0.3]),
)
def test_mse_is_never_worse_than_min_max(
    seed: int, bits: int, symmetric: bool, power: int, shift: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2000, generator=generator) ** power + shift  # higher powers have outliers
    spec = {"bits": bits, "symmetric": symmetric}
    searched = observed(TensorSpec(observer=ObserverKind.MSE, **spec), x).fit()
    plain = observed(TensorSpec(**spec), x).fit()
    error = float((searched(x) - x).square().mean())
    limit = float((plain(x) - x).square().mean())
    # The search sees bins, not values: half a bin's width moves each value.
    half_bin = 2 * float(x.abs().max()) / BINS
    assert error**0.5 <= limit**0.5 + 2 * half_bin


@given(
    seed=st.integers(0, 1000),
    bits=st.integers(2, 8),
    spread=st.floats(0.1, 8),
    source=st.sampled_from([F.gelu, F.silu, lambda x: x.softmax(-1)]),
)
def test_twins_by_mse_are_never_worse_than_by_min_max(
    seed: int, bits: int, spread: float, source: Callable[[Tensor], Tensor]
) -> None:
    x = source(torch.randn(20, 50, generator=torch.Generator().manual_seed(seed)) * spread)
    errors = {}
    for kind in ANY_VALUES:
        spec = TensorSpec(
            bits=bits, scheme=Scheme.TWIN_UNIFORM, observer=kind, **clipped(kind, 99.0)
        )
        quantizer = observed(spec, *x.split(5)).fit()
        errors[kind] = float((quantizer(x) - x).square().mean()) ** 0.5
        assert quantizer.two_sided == bool((x < 0).any())
    half_bin = 2 * float(x.abs().max()) / BINS
    assert errors[ObserverKind.MSE] <= errors[ObserverKind.MINMAX] + half_bin
    assert errors[ObserverKind.MSE] <= errors[ObserverKind.PERCENTILE] + 2 * half_bin


@given(seed=st.integers(0, 1000), exponent=st.integers(-80, 90), symmetric=st.booleans())
def test_mse_does_not_depend_on_the_unit(seed: int, exponent: int, symmetric: bool) -> None:
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed)) ** 3
    spec = TensorSpec(bits=4, symmetric=symmetric, observer=ObserverKind.MSE)
    small, large = observed(spec, x).fit(), observed(spec, x * 2.0**exponent).fit()
    assert float(large.scale) == float(small.scale) * 2.0**exponent
    assert torch.equal(large.zero_point, small.zero_point)


def test_mse_clips_an_outlier() -> None:
    x = torch.cat([torch.linspace(-1, 1, 1000), torch.tensor([8.0])])
    spec = TensorSpec(bits=4, observer=ObserverKind.MSE)
    searched = observed(spec, x).fit()
    plain = observed(TensorSpec(bits=4), x).fit()
    assert (searched(x) - x).square().mean() < 0.8 * (plain(x) - x).square().mean()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_raise_and_name_the_edge(kind: ObserverKind, bad: float) -> None:
    observer = make_observer(TensorSpec(observer=kind), axis=None, where="blocks_0_fc1__input")
    text = "^blocks_0_fc1__input: NaN or infinity during calibration"
    with refused(NonFiniteError, text, edge="blocks_0_fc1__input"):
        observer(torch.tensor([1.0, bad]))


@pytest.mark.parametrize("kind", KINDS)
def test_an_edge_without_data_raises(kind: ObserverKind) -> None:
    observer = make_observer(TensorSpec(observer=kind), axis=None, where="blocks_0_fc1__input")
    observer(torch.empty(0, 4))
    text = "^blocks_0_fc1__input: no calibration data"
    with refused(CalibrationError, text, edge="blocks_0_fc1__input"):
        observer.fit()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 0.3, -5.0, 1e-38, 1e38])
def test_constant_data_gives_a_usable_quantizer(kind: ObserverKind, value: float) -> None:
    x = torch.full((10,), value)
    y = observed(TensorSpec(observer=kind), x).fit()(x)
    assert bool(torch.isfinite(y).all())
    torch.testing.assert_close(y, x, rtol=1e-3, atol=1e-30)


def test_histogram_counts_every_value_once() -> None:
    observer = observed(TensorSpec(observer=ObserverKind.MSE), *torch.randn(5, 7, 3, 4), axis=-1)
    assert isinstance(observer, HistogramObserver) and observer.counts is not None
    assert observer.counts.sum(1).tolist() == [5 * 7 * 3.0] * 4


@pytest.mark.parametrize(
    ("granularity", "axis", "count"),
    [(Granularity.TENSOR, None, ()), (Granularity.CHANNEL, -1, (4,)), (Granularity.HEAD, -3, (2,))],
)
@pytest.mark.parametrize("kind", KINDS)
def test_one_scale_a_row(
    kind: ObserverKind, granularity: Granularity, axis: int | None, count: tuple[int, ...]
) -> None:
    spec = TensorSpec(observer=kind, granularity=granularity)
    quantizer = observed(spec, torch.randn(5, 2, 3, 4), axis=axis).fit()
    assert tuple(quantizer.scale.shape) == count


def test_what_a_softmax_takes_to_zero_is_not_covered() -> None:
    spec = TensorSpec(observer=ObserverKind.SOFTMAX)
    scores = torch.tensor([[3.0, 1.0, -100.0], [-2.0, -3.0, -104.0]])
    lo, hi = observed(spec, scores[:1], scores[1:])._fit_range(spec)
    assert (float(lo), float(hi)) == (-14.0, 3.0)
    quantizer = observed(spec, scores).fit()
    shares, exact = quantizer(scores).softmax(-1), scores.softmax(-1)
    assert float((shares - exact).abs().max()) < 0.01
    near = torch.tensor([[3.0, 1.0, -5.0]])  # nothing is cut off where there is no mask
    assert float(observed(spec, near)._fit_range(spec)[0]) == -5.0


@given(seed=st.integers(0, 99), bits=st.integers(2, 6))
def test_the_best_of_two_kinds_is_that_of_least_squared_error(seed: int, bits: int) -> None:
    x = torch.nn.functional.gelu(
        2 * torch.randn(4000, generator=torch.Generator().manual_seed(seed))
    )
    spec = TensorSpec(bits=bits, observer=ObserverKind.MSE)
    observer = observed(spec, x)
    assert isinstance(observer, HistogramObserver)
    both = [observer.fit(), observer.fit(replace(spec, scheme=Scheme.TWIN_UNIFORM))]
    errors = [float((quantizer(x) - x).square().mean()) for quantizer in both]
    chosen = both.index(observer.best(both))
    assert errors[chosen] <= 1.02 * min(errors)  # a histogram is not the data
