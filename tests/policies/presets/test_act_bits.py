"""Widths of activations that a preset's quantizers do not have."""

from __future__ import annotations

import pytest

from fxquant import policies
from fxquant.errors import BitWidthError
from tests.helpers.cli_helpers import fails


@pytest.mark.parametrize(
    ("preset", "scheme", "remedy"),
    [
        ("ptq4vit", "twin_uniform", "ptq4vit(twin=False)"),
        ("mptq_vit", "twin_uniform", "ptq4vit(twin=False)"),
        ("aiqvit", "dynamic_focusing", "aiqvit(focusing=False)"),
    ],
)
@pytest.mark.parametrize("bits", [9, 16])
def test_an_error_names_the_option_and_the_remedy(
    preset: str, scheme: str, remedy: str, bits: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BitWidthError) as caught:
        policies.preset(preset, act_bits=bits)
    assert (caught.value.got, caught.value.expected) == (bits, "2..8")
    printed = fails(capsys, "policies", preset, "--act-bits", str(bits))
    for message in (str(caught.value), printed):
        assert f"act_bits (--act-bits) must be at most 8 with {scheme} quantizers" in message
        assert "choose at most 8 bits" in message and remedy in message


@pytest.mark.parametrize("preset", ["ptq4vit", "mptq_vit", "aiqvit"])
def test_widths_that_no_quantizer_has_are_refused_as_everywhere(preset: str) -> None:
    for bits in (1, 17, "9"):
        with pytest.raises(BitWidthError, match=r"^bits must be"):
            policies.preset(preset, act_bits=bits)


def test_the_remedies_work() -> None:
    assert policies.ptq4vit(4, 9, twin=False).rules and policies.aiqvit(4, 9, focusing=False).rules
    assert policies.best(4, 9).rules
