"""Quantizers of each scheme with data that reaches beyond both of their ends.

``CASES`` has a row for each scheme: the laws of quantizers (``tests/quantizers/test_laws.py``) hold
for all that a row draws. A new scheme joins by a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from fxquant.config.spec import Scheme, TensorSpec
from fxquant.quantizers import (
    FAMILIES,
    DynamicFocusingQuantizer,
    LogQuantizer,
    Quantizer,
    TwinUniformQuantizer,
    UniformQuantizer,
    largest_start,
)
from fxquant.quantizers.ops import broadcast

# Axis a scale runs along -> what the granularity is called; the data is (2, 3, 4, 5).
AXES = {None: "tensor", 0: "weight channel", -1: "channel", -3: "head"}
Q_co = TypeVar("Q_co", bound=Quantizer, covariant=True)


@dataclass
class Case(Generic[Q_co]):
    """A quantizer and data to quantize."""

    quantizer: Q_co
    x: Tensor


@dataclass
class RangeCase(Case[UniformQuantizer]):
    """A uniform quantizer with the range that it was fitted to, which some of the data leaves."""

    lo: Tensor
    hi: Tensor

    def along(self, values: Tensor) -> Tensor:
        """A per-axis parameter in a shape that broadcasts against the data."""
        return broadcast(values, self.x.ndim, self.quantizer.axis)


@st.composite
def uniform_cases(draw: st.DrawFn, scheme: Scheme = Scheme.UNIFORM) -> RangeCase:
    """Uniform quantizers of any width, symmetry and axis, for values of any size."""
    spec = TensorSpec(scheme=scheme, bits=draw(st.integers(2, 16)), symmetric=draw(st.booleans()))
    axis = draw(st.sampled_from(list(AXES)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    magnitude = 10.0 ** draw(st.integers(-20, 20))
    shift = draw(st.sampled_from([0.0, 3.0, -3.0]))
    x = (torch.randn(2, 3, 4, 5, generator=generator) + shift) * magnitude
    rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)
    lo, hi = 0.6 * rows.amin(1), 0.6 * rows.amax(1)
    if axis is None:
        lo, hi = lo[0], hi[0]
    quantizer = FAMILIES[scheme].fit(lo, hi, spec, axis)
    assert isinstance(quantizer, UniformQuantizer)
    return RangeCase(quantizer, x, lo, hi)


@st.composite
def twin_cases(draw: st.DrawFn) -> Case[TwinUniformQuantizer]:
    """Twin quantizers, values of every size from a tenth of a fine step to past the coarse end."""
    bits, two_sided = draw(st.integers(2, 8)), draw(st.booleans())
    shift = draw(st.integers(0 if two_sided else 1, 11))
    scale = torch.tensor(draw(st.floats(1e-6, 1e3)))
    quantizer = TwinUniformQuantizer(scale, shift=shift, bits=bits, two_sided=two_sided)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    reach = torch.log2(10 * quantizer.levels * torch.tensor(2.0**shift))
    exponent = torch.rand(3, 4, 50, generator=generator) * (reach + 3) - 3
    sign = torch.randn(3, 4, 50, generator=generator).sign()
    return Case(quantizer, sign * scale * 2**exponent)


@st.composite
def focusing_cases(draw: st.DrawFn) -> Case[DynamicFocusingQuantizer]:
    """Dynamic focusing quantizers with any start of their interval."""
    bits = draw(st.integers(2, 8))
    start = draw(st.integers(0, largest_start(bits)))
    scale = torch.tensor(draw(st.floats(1e-6, 1e3)))
    quantizer = DynamicFocusingQuantizer(scale, start=start, bits=bits)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    steps = torch.rand(3, 4, 50, generator=generator) * 1.5 * (start + 2**bits) - 1
    return Case(quantizer, steps * scale)


octaves = (
    st.tuples(st.integers(1, 24), st.integers(1, 16))
    .map(lambda pair: (pair[0] // math.gcd(*pair), pair[1] // math.gcd(*pair)))
    .filter(lambda pair: pair[0] / pair[1] <= 4)
)


@st.composite
def log_cases(
    draw: st.DrawFn, steps: st.SearchStrategy[tuple[int, int]] = octaves
) -> Case[LogQuantizer]:
    """Logarithmic quantizers, values from below the smallest power to above the largest."""
    bits, (n, d) = draw(st.integers(2, 8)), draw(steps)
    scale = torch.tensor(draw(st.floats(1e-6, 1e3)))
    quantizer = LogQuantizer(scale, bits=bits, n=n, d=d)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    exponent = 3 - torch.rand(3, 4, 50, generator=generator) * (quantizer.zero_code * n / d + 8)
    x = scale * 2**exponent
    x[0, 0, :2] = torch.tensor([0.0, -float(scale)])
    return Case(quantizer, x)


@dataclass(frozen=True)
class SchemeCases:
    """Row of a scheme.

    Attributes:
        cases: draws quantizers and data.
        label: label of asymmetric specs in reports.
        symmetric_label: label of symmetric specs; None where the scheme allows none.
        always_has_zero: whether zero is a value of every grid of the scheme.
    """

    cases: st.SearchStrategy[Case[Quantizer]]
    label: str
    symmetric_label: str | None = None
    always_has_zero: bool = True


CASES = {
    Scheme.UNIFORM: SchemeCases(uniform_cases(), "asym", "sym"),
    Scheme.POWER_OF_TWO: SchemeCases(uniform_cases(Scheme.POWER_OF_TWO), "asym 2^n", "sym 2^n"),
    Scheme.TWIN_UNIFORM: SchemeCases(twin_cases(), "twin"),
    Scheme.DYNAMIC_FOCUSING: SchemeCases(focusing_cases(), "focus", always_has_zero=False),
    Scheme.LOG2: SchemeCases(log_cases(st.just((1, 1))), "log2"),
    Scheme.ADALOG: SchemeCases(log_cases(), "adalog"),
}
