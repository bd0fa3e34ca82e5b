"""Which model families run integer-only, and what stands in the way of the others."""

import pytest
import torch

import fxquant
from fxquant import policies
from fxquant.backends.integer import float_operations
from tests.test_integer_only import assert_same_codes
from tests.zoo import FAMILIES, Family

REASONS = {
    "swinv2_tiny_window8_256": "linalg_vector_norm has no integer form",
    "eva02_tiny_patch14_224": "mul has no integer form",  # rotary embedding
    "levit_128s": "batch_norm has no integer form",
    "maxvit_rmlp_pico_rw_256": "avg_pool2d has no integer form",
    "torchvision swin_v2": "linalg_vector_norm has no integer form",
    "torchvision maxvit": "avg_pool2d has no integer form",
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_family_runs_integer_only_or_says_why_not(family: Family) -> None:
    images = torch.randn(4, *family.image, generator=torch.Generator().manual_seed(1))
    qm = fxquant.compile(family.model(), [images], policies.w8a8(full=True))
    lowered = qm.lower("integer")
    if family.name in REASONS:
        assert lowered.meta["float_because"].endswith(REASONS[family.name])
        return
    assert lowered.meta["float_because"] == ""
    assert float_operations(lowered, images[:1]) == []
    assert_same_codes(qm, lowered, images[:2])
