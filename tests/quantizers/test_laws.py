"""The laws that the quantizers of every family keep."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.config.spec import Scheme, TensorSpec
from fxquant.errors import CalibrationError
from fxquant.quantizers import (
    FAMILIES,
    DynamicFocusingQuantizer,
    LogQuantizer,
    PowerOfTwoQuantizer,
    Quantizer,
    TwinUniformQuantizer,
    UniformQuantizer,
    from_config,
)
from fxquant.quantizers.candidates import ADALOG_OCTAVES
from fxquant.quantizers.ops import broadcast
from tests.helpers.quantizer_cases import CASES, Case

every_scheme = pytest.mark.parametrize("scheme", CASES)


def drawn(data: st.DataObject, scheme: Scheme) -> Case[Quantizer]:
    return data.draw(CASES[scheme].cases)


def test_every_scheme_has_a_family_and_cases() -> None:
    assert set(FAMILIES) == set(CASES) == set(Scheme)


@every_scheme
@given(data=st.data())
def test_a_quantizer_is_of_its_family(scheme: Scheme, data: st.DataObject) -> None:
    quantizer = drawn(data, scheme).quantizer
    assert type(quantizer) is FAMILIES[scheme].quantizer


@every_scheme
@given(data=st.data())
def test_codes_are_whole_numbers_of_the_code_range(scheme: Scheme, data: st.DataObject) -> None:
    case = drawn(data, scheme)
    codes, (least, largest) = case.quantizer.quantize(case.x), case.quantizer.code_range
    assert torch.equal(codes, codes.round())
    assert least <= codes.min() and codes.max() <= largest
    assert largest - least + 1 == 2**case.quantizer.bits


@every_scheme
@given(data=st.data())
def test_forward_is_dequantize_of_quantize(scheme: Scheme, data: st.DataObject) -> None:
    case = drawn(data, scheme)
    codes = case.quantizer.quantize(case.x)
    assert torch.equal(case.quantizer(case.x), case.quantizer.dequantize(codes))


@every_scheme
@given(data=st.data())
def test_forward_is_idempotent(scheme: Scheme, data: st.DataObject) -> None:
    case = drawn(data, scheme)
    once = case.quantizer(case.x)
    assert torch.equal(case.quantizer(once), once)
    assert torch.equal(case.quantizer.quantize(once), case.quantizer.quantize(case.x))


@every_scheme
@given(data=st.data())
def test_forward_is_monotone(scheme: Scheme, data: st.DataObject) -> None:
    case = drawn(data, scheme)
    larger = case.x + torch.rand_like(case.x) * case.x.abs()
    assert bool((case.quantizer(larger) >= case.quantizer(case.x)).all())
    # Along an axis other than that of the scale, all values of a row have one scale.
    rows = case.x.flatten() if case.quantizer.scale_axis is None else case.x
    along = -2 if case.quantizer.scale_axis == -1 else -1
    ordered = case.quantizer(rows.sort(dim=along).values if rows.ndim > 1 else rows.sort().values)
    assert bool((ordered.diff(dim=along if rows.ndim > 1 else -1) >= 0).all())


@every_scheme
@given(data=st.data())
def test_the_code_of_zero_stands_for_zero(scheme: Scheme, data: st.DataObject) -> None:
    """Where zero has no code, as in an interval that begins above it, the code is out of range."""
    case = drawn(data, scheme)
    quantizer, (least, largest) = case.quantizer, case.quantizer.code_range
    codes = quantizer.zero_codes
    assert codes.shape == quantizer.scale.shape
    if bool(((codes >= least) & (codes <= largest)).all()):
        along = broadcast(codes, case.x.ndim, quantizer.scale_axis)
        assert bool((quantizer.dequantize(along.expand_as(case.x)) == 0).all())
        assert torch.equal(quantizer.quantize(torch.zeros_like(case.x)), along.expand_as(case.x))
    else:
        assert not CASES[scheme].always_has_zero


@every_scheme
@given(data=st.data())
def test_state_is_complete(scheme: Scheme, data: st.DataObject) -> None:
    case = drawn(data, scheme)
    again = from_config(case.quantizer.config())
    again.load_state_dict(case.quantizer.state_dict())
    assert type(again) is type(case.quantizer)
    assert again.bits == case.quantizer.bits
    assert again.config() == case.quantizer.config()
    assert torch.equal(again(case.x), case.quantizer(case.x))
    assert torch.equal(again.quantize(case.x), case.quantizer.quantize(case.x))


@every_scheme
@given(data=st.data())
def test_broken_numbers_have_a_fault(scheme: Scheme, data: st.DataObject) -> None:
    quantizer = drawn(data, scheme).quantizer
    assert quantizer.fault() is None
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        broken = copy.deepcopy(quantizer)
        broken.scale.view(-1)[0] = wrong
        assert "not positive and finite" in (broken.fault() or "")


ONE = torch.ones(())
BROKEN: list[Callable[[], Quantizer]] = [
    lambda: UniformQuantizer(-ONE, ONE, bits=4, signed=False, axis=None),
    lambda: UniformQuantizer(ONE, ONE, bits=4, signed=False, axis=0),
    lambda: PowerOfTwoQuantizer(3 * ONE, 0 * ONE, bits=4, signed=True, axis=None),
    lambda: TwinUniformQuantizer(ONE, shift=0, bits=4, two_sided=False),
    lambda: DynamicFocusingQuantizer(ONE, start=241, bits=4),
    lambda: DynamicFocusingQuantizer(-ONE, start=1, bits=4),
    lambda: LogQuantizer(ONE, bits=4, n=2, d=2),
]


@pytest.mark.parametrize("make", BROKEN)
def test_a_traceback_can_show_a_quantizer_whose_constructor_raised(
    make: Callable[[], Quantizer],
) -> None:
    with pytest.raises(CalibrationError) as caught:
        make()
    quantizer = caught.traceback[-1].frame.f_locals["self"]
    assert "bits=4" in repr(quantizer)


@pytest.mark.parametrize("scheme", [s for s in CASES if FAMILIES[s].candidates is not None])
def test_candidates_reach_their_share_of_the_range(scheme: Scheme) -> None:
    candidates = FAMILIES[scheme].candidates
    assert candidates is not None
    spec = TensorSpec(bits=min(4, scheme.limits.max_bits), scheme=scheme)
    rows = candidates(0.0, 3.0, spec, (0.5, 1.0))
    tops = [float(q(torch.tensor(1e6))) for row in rows for q in row]
    assert all(type(q) is FAMILIES[scheme].quantizer for row in rows for q in row)
    assert max(tops) == pytest.approx(3.0) and min(tops) == pytest.approx(1.5, rel=0.6)


@pytest.mark.parametrize("scheme", [s for s in CASES if FAMILIES[s].trained is not None])
@given(data=st.data())
def test_training_starts_at_the_quantizer(scheme: Scheme, data: st.DataObject) -> None:
    case, form = drawn(data, scheme), FAMILIES[scheme].trained
    assert form is not None
    fitted = form(case.quantizer, 0.0).fitted()
    assert type(fitted) is type(case.quantizer)
    assert torch.equal(fitted(case.x), case.quantizer(case.x))


@every_scheme
def test_every_label(scheme: Scheme) -> None:
    bits, row = min(8, scheme.limits.max_bits), CASES[scheme]
    labels = {
        symmetric: FAMILIES[scheme].label(TensorSpec(scheme=scheme, bits=bits, symmetric=symmetric))
        for symmetric in (False, True)
        if scheme.limits.allows_symmetric or not symmetric
    }
    expected = {False: row.label, True: row.symmetric_label}
    assert labels == {key: label for key, label in expected.items() if label is not None}


@every_scheme
def test_schemes_for_weights_are_uniform(scheme: Scheme) -> None:
    """Training, GPTQ and the integer products rely on it."""
    uniform = issubclass(FAMILIES[scheme].quantizer, UniformQuantizer)
    assert uniform or not scheme.limits.allows_weights


def test_labels_differ() -> None:
    labels = [(row.label, row.symmetric_label) for row in CASES.values()]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("scheme", [Scheme.LOG2, Scheme.ADALOG])
def test_log_schemes_begin_with_powers_of_two_and_try_their_bases(scheme: Scheme) -> None:
    spec, family = TensorSpec(bits=4, scheme=scheme), FAMILIES[scheme]
    fitted = family.fit(torch.tensor(0.0), torch.tensor(1.0), spec, None)
    assert isinstance(fitted, LogQuantizer) and (fitted.n, fitted.d) == (1, 1)
    assert family.candidates is not None
    bases = [
        Fraction(q.n, q.d)
        for (q,) in family.candidates(0.0, 1.0, spec, (1.0,))
        if isinstance(q, LogQuantizer)
    ]
    assert bases == ([Fraction(1)] if scheme is Scheme.LOG2 else list(ADALOG_OCTAVES))
