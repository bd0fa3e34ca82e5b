"""The laws that every quantizer keeps, whatever its grid."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.quantizers import Quantizer, from_config


def assert_forward_is_dequantize_of_quantize(quantizer: Quantizer, x: Tensor) -> None:
    assert torch.equal(quantizer(x), quantizer.dequantize(quantizer.quantize(x)))


def assert_idempotent(quantizer: Quantizer, x: Tensor) -> None:
    once = quantizer(x)
    assert torch.equal(quantizer(once), once)
    assert torch.equal(quantizer.quantize(once), quantizer.quantize(x))


def assert_monotone(quantizer: Quantizer, x: Tensor) -> None:
    ordered = quantizer(x.flatten().sort().values)
    assert bool((ordered.diff() >= 0).all())


def assert_codes_are_whole(quantizer: Quantizer, x: Tensor) -> None:
    """Whole numbers from zero up, of as many bits as the quantizer says."""
    codes = quantizer.quantize(x)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= 0 and codes.max() < 2**quantizer.bits


def assert_state_is_complete(quantizer: Quantizer, x: Tensor) -> None:
    again = from_config(quantizer.config())
    again.load_state_dict(quantizer.state_dict())
    assert isinstance(again, Quantizer)
    assert again.bits == quantizer.bits
    assert again.config() == quantizer.config()
    assert torch.equal(again(x), quantizer(x))
    assert torch.equal(again.quantize(x), quantizer.quantize(x))
