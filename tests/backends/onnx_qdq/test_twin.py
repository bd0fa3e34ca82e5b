"""Twin uniform quantizers in ONNX files: the simulation's codes, on integer kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fxquant
from fxquant import CompiledModel, Rule
from fxquant.backends.onnx_qdq import TARGETS, OnnxExport, doctor, make_session
from fxquant.backends.onnx_qdq.lowerings import rewrite_quantizers
from fxquant.demo.glyphs import GlyphDataset
from fxquant.demo.models import build
from fxquant.quantizers import TwinUniformQuantizer
from fxquant.quantizers.ops import twin_threshold
from fxquant.testing import DIM, images, seeded, tokens
from tests.helpers.agreement import assert_same_codes
from tests.helpers.integer_helpers import assert_integer_equals_simulation
from tests.helpers.through import through, with_neighbours
from tests.helpers.twin_nets import NETS, compiled, found, twins

Export = Callable[[str, int, int | None], OnnxExport]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exports each of the nets once."""
    folder = tmp_path_factory.mktemp("files")

    @cache
    def run(net: str, bits: int, max_shift: int | None) -> OnnxExport:
        model = compiled(net, bits, max_shift)
        return model.export_onnx(folder / f"{net}_{bits}_{max_shift}.onnx")

    return run


def assert_runs_as_simulated(model: CompiledModel, exported: OnnxExport, x: Tensor) -> None:
    """Outputs and codes agree, on values past the ends of the grids too."""
    session = make_session(exported.path)
    for batch in (x, x[:1], 3 * x):
        result = torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])
        torch.testing.assert_close(result, model(batch), rtol=1e-3, atol=1e-3)
    assert_same_codes(model, exported.path, x)
    assert_same_codes(model, exported.path, 3 * x)


@pytest.mark.parametrize(
    ("net", "bits", "max_shift", "products", "kernels"),
    [
        # q, k, v, proj, fc1, fc2, and two products of attention
        ("block", 4, None, [1, 1], {"QGemm": 6, "MatMulIntegerToFloat": 2}),
        ("block", 8, None, [2, 2], {"QGemm": 6, "MatMulIntegerToFloat": 4}),
        # point, patch and head; stem and depthwise have float outputs
        ("conv", 6, None, [0, 2, 2, 2], {"QGemm": 3, "MatMulIntegerToFloat": 3}),
        ("pair", 3, None, [1, 1], {"MatMulIntegerToFloat": 1}),
        ("pair", 6, None, [2, 2], {"MatMulIntegerToFloat": 4}),
        ("pair", 8, 1, [2, 1], {"MatMulIntegerToFloat": 2}),
    ],
)
def test_onnxruntime_runs_integer_kernels_on_the_simulations_codes(
    export: Export,
    net: str,
    bits: int,
    max_shift: int | None,
    products: list[int],
    kernels: dict[str, int],
) -> None:
    exported = export(net, bits, max_shift)
    assert [form.products for form in exported.twins] == products
    assert exported.fused == kernels
    assert [item.op for item in exported.unfused] == (["Conv", "Conv"] if net == "conv" else [])
    assert_runs_as_simulated(compiled(net, bits, max_shift), exported, NETS[net][1](5))


def test_the_export_says_what_twins_cost(export: Export) -> None:
    exported = export("block", 8, None)
    assert "twin codes: 2 in two (twice the multiplications" in str(exported)
    attention, mlp = map(str, exported.twins)
    assert attention == (
        "attn_matmul_1__lhs: codes need 16,257 levels: two products (max_shift=1 or fewer bits "
        "would make it one)"
    )
    assert mlp.startswith("fc2__input: codes need") and "(fewer bits would" in mlp
    assert str(export("block", 4, None).twins[0]) == "attn_matmul_1__lhs: 57 levels: one product"
    assert "twin codes: 2 in one product" in str(export("block", 4, None))


def test_the_advised_shift_gives_one_product(export: Export) -> None:
    advised = export("pair", 6, None).twins[0].max_shift
    assert advised is not None
    sizes = [
        max(q.grid_size for q in found(compiled("pair", 6, bound)).values() if q.two_sided)
        for bound in (advised, advised + 1)
    ]
    assert sizes[0] <= 256 < sizes[1]


def test_a_weight_of_two_products_is_stored_once(export: Export) -> None:
    file = onnx.load(str(export("block", 8, None).path))
    tensors = {t.name: t for t in file.graph.initializer}
    codes = [name for name in tensors if name.endswith("weight_codes")]
    assert len(codes) == 6  # q, k, v, proj, fc1, fc2
    readers = [n for n in file.graph.node if n.input and n.input[0] == "fc2__weight_codes"]
    assert {n.op_type for n in readers} == {"DequantizeLinear"}
    assert "fc2__input_scale" in tensors and "fc2_high__input_scale" in tensors


def test_the_doctor_finds_a_file_with_twins_healthy(export: Export) -> None:
    report = doctor(export("block", 8, None).path)
    assert report.ok and report.unfused == () and report.fused == export("block", 8, None).fused


def test_products_fuse_for_every_target(export: Export, tmp_path: Path) -> None:
    here = export("pair", 6, None)
    for target in TARGETS.keys() - {here.target}:
        exported = compiled("pair", 6, None).export_onnx(tmp_path / "m.onnx", target=target)
        assert exported.fused == here.fused and exported.unfused == ()


@pytest.mark.parametrize("name", ["attn_matmul_1__lhs_threshold", "fc2__input_coarse_scale"])
def test_the_comparison_of_codes_sees_one_wrong_constant(
    export: Export, tmp_path: Path, name: str
) -> None:
    file = onnx.load(str(export("block", 4, None).path))
    (tensor,) = (tensor for tensor in file.graph.initializer if tensor.name == name)
    wrong = np.asarray(onnx.numpy_helper.to_array(tensor) * np.float32(1.05))
    tensor.CopyFrom(onnx.numpy_helper.from_array(wrong, name))
    onnx.save(file, str(tmp_path / "wrong.onnx"))
    with pytest.raises(AssertionError, match=name.partition("__")[0] + "|none of the twin's"):
        assert_same_codes(compiled("block", 4, None), tmp_path / "wrong.onnx", tokens(6))


@given(
    bits=st.integers(2, 8),
    shift=st.integers(1, 11),
    two_sided=st.booleans(),
    scale=st.floats(1e-6, 1e3),
    weight_bits=st.sampled_from([None, 8]),
)
def test_every_form_gives_the_same_value_to_the_last_bit(
    bits: int, shift: int, two_sided: bool, scale: float, weight_bits: int | None
) -> None:
    """One product, two products and values in float, on and next to every border."""
    twin = TwinUniformQuantizer(torch.tensor(scale), shift=shift, bits=bits, two_sided=two_sided)
    gm = through(twin, weight_bits)
    halves = torch.arange(-2 * twin.levels, 2 * twin.levels + 2) / 2
    borders = torch.cat([halves * twin.scale, halves * twin.coarse_scale])
    if not two_sided:
        borders = torch.cat([borders, (twin.scale * twin_threshold(shift, bits)).view(1)])
    x = with_neighbours(borders)
    expected = gm(x)
    (form,) = rewrite_quantizers(gm)
    gm.recompile()
    assert form.products == (1 if twin.grid_size <= 256 else 2 if weight_bits else 0)
    assert torch.equal(gm(x), expected)


def test_a_float_operand_gets_the_values(tmp_path: Path) -> None:
    rule, model = Rule(arg="weight", spec=None), nn.Sequential(nn.GELU(), nn.Linear(DIM, DIM))
    model = fxquant.compile(seeded(model), [3 * tokens(6)], twins(6).with_rules(rule))
    exported = model.export_onnx(tmp_path / "m.onnx")
    (form,) = exported.twins
    assert form.products == 0 and "its values in float" in str(form)
    assert [item.reason for item in exported.unfused] == ["both operands are float"]
    assert "twin codes: 1 in float" in str(exported)
    assert_runs_as_simulated(model, exported, 3 * tokens(5))


def test_a_vision_transformer(vit: nn.Module, tmp_path: Path) -> None:
    model = fxquant.compile(vit, [images(6, 16)], twins(8))
    exported = model.export_onnx(tmp_path / "m.onnx")
    assert exported.unfused == ()
    assert_runs_as_simulated(model, exported, images(5, 16))


def test_a_swin_transformer(swin: nn.Module, tmp_path: Path) -> None:
    model = fxquant.compile(swin, [images(4, 32)], twins(4))
    exported = model.export_onnx(tmp_path / "m.onnx")
    assert exported.unfused == () and len(exported.twins) == 4
    lowered = model.lower("integer")
    assert_integer_equals_simulation(model.graph_module, lowered, images(5, 32))
    assert_runs_as_simulated(model, exported, images(5, 32))


# A code that falls the other way at a tie changes the class of one image in a hundred where
# there are four bits, whatever the runtime: the integer kernels as well, and uniform codes too.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bits", "agreement"), [("glyph_vit", 4, 0.985), ("glyph_swin", 8, 0.995)]
)
def test_the_shipped_models(name: str, bits: int, agreement: float, tmp_path: Path) -> None:
    calibration = DataLoader(GlyphDataset("calib", 32), batch_size=16)
    model = fxquant.compile(build(name), calibration, twins(bits))
    exported = model.export_onnx(tmp_path / "m.onnx")
    assert exported.unfused == () and exported.fused["QGemm"] >= 38
    test, _ = next(iter(DataLoader(GlyphDataset("test", 200), batch_size=200)))
    session, same = make_session(exported.path, 1), 0
    for part in test.split(50):
        result = torch.from_numpy(session.run(None, {"images": part.numpy()})[0])
        with torch.no_grad():
            same += int((result.argmax(1) == model(part).argmax(1)).sum())
    assert same >= agreement * 200
    assert_same_codes(model, exported.path, test[:20])
