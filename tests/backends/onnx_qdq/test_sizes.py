"""An exported file is as large as the plan says, a width for each layer."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import fxquant
from fxquant import CompiledModel, Policy, Rule, TensorSpec, policies
from fxquant.backends.onnx_qdq import TARGETS, make_session
from fxquant.config.vocabulary import Arg
from fxquant.quantizers import Quantizer
from fxquant.testing import images
from tests.helpers.agreement import assert_same_codes

# Path of a layer -> bits of its weight; the first that matches decides.
WIDTHS = {
    r"blocks\.1\.mlp\.fc1": 5,
    r"blocks\.1\.mlp\.fc2": 4,
    r".*qkv": 7,
    r".*proj": 3,
    r".*fc1": 2,
    r".*fc2": 6,
}


def mixed() -> Policy:
    rules = (
        Rule(
            path=path,
            arg=Arg.WEIGHT,
            spec=TensorSpec(bits=bits, symmetric=True, granularity="channel"),
        )
        for path, bits in WIDTHS.items()
    )
    return policies.w8a8().with_rules(*rules)


@cache
def compiled() -> CompiledModel:
    """A ViT large enough for its weights to dominate the file; biases are not zero."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_small_patch16_224", img_size=16, patch_size=8, depth=2, num_classes=10
    )
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm | nn.Conv2d):
            nn.init.normal_(module.bias, std=0.02)
    return fxquant.compile(model.eval(), [images(4, 16)], mixed())


def test_the_plan_counts_weights_at_their_width_and_scales() -> None:
    gm, report = compiled().graph_module, compiled().report
    weights = {e.quantizer: e.spec.bits for e in report.plan if e.arg == Arg.WEIGHT and e.spec}
    assert set(weights.values()) == {2, 3, 4, 5, 6, 7, 8}
    # embed, q, k, v and proj, fc1, fc2; then the head
    values = {2: 384 * 1536, 3: 2 * 384**2 + 3 * 64 * 384, 4: 384 * 1536, 5: 384 * 1536}
    values |= {6: 384 * 1536, 7: 6 * 384**2, 8: 3840}
    coded = sum(bits * count / 8 for bits, count in values.items())
    others = report.float_bytes - 4 * sum(values.values())
    scales = sum(m.scale.numel() for m in gm.modules() if isinstance(m, Quantizer))
    assert report.quantized_bytes == coded + others + 4 * scales


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_the_file_is_as_large_as_the_plan(target: str, tmp_path: Path) -> None:
    exported = compiled().export_onnx(tmp_path / "m.onnx", target=target)
    assert set(exported.packed) == {2, 3, 4, 5, 6, 7}
    assert exported.unfused == () and sum(exported.fused.values()) == 18
    plan = compiled().report.quantized_bytes
    assert abs(exported.file_bytes - plan) < 0.03 * plan
    if exported.difference is None:  # this CPU's product overflows on the target's types
        return
    assert_same_codes(compiled(), exported.path, images(3, 16))
    result = make_session(exported.path).run(None, {"images": images(3, 16).numpy()})[0]
    torch.testing.assert_close(
        torch.from_numpy(result), compiled()(images(3, 16)), rtol=0.02, atol=0.02
    )
