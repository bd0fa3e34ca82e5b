"""Weights of 2 to 7 bits take their width in the file and a byte in the kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import nn

import fxquant
from fxquant import CompiledModel, Policy, Rule, TensorSpec, policies
from fxquant.backends.onnx_qdq import TARGETS, OnnxExport, doctor, make_session, packing
from fxquant.backends.onnx_qdq.packing import pack, pack_weights
from fxquant.config.vocabulary import Arg
from fxquant.errors import LoweringError
from fxquant.graph.edges import quantized_edges
from fxquant.graph.nodes import constant, operand, submodule
from fxquant.quantizers import UniformQuantizer
from fxquant.testing import DIM, Block, seeded, tokens
from tests.helpers.agreement import assert_same_codes
from tests.helpers.refusals import refused

WIDTHS = range(2, 8)


def unpacked(codes: NDArray[np.generic], bits: int, *, optimize: bool) -> NDArray[np.generic]:
    """What onnxruntime makes of codes that were packed."""
    kind = helper.np_dtype_to_tensor_dtype(codes.dtype)
    graph = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"])],
        "g",
        [],
        [helper.make_tensor_value_info("y", kind, codes.shape)],
        [onnx.numpy_helper.from_array(codes, "w")],
    )
    opsets = [helper.make_opsetid("", 21)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    assert pack_weights(model, {"w": bits, "merged": bits}) == {bits: codes.size}
    file = ir.to_proto(model)
    onnx.checker.check_model(file)
    options = ort.SessionOptions()
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        file.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {})[0])


@given(
    bits=st.sampled_from(WIDTHS),
    signed=st.booleans(),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    optimize=st.booleans(),
    seed=st.integers(0, 99),
)
def test_onnxruntime_unpacks_every_code(
    bits: int, signed: bool, shape: list[int], optimize: bool, seed: int
) -> None:
    lowest = -(1 << (bits - 1)) if signed else 0
    draw = np.random.default_rng(seed).integers(lowest, lowest + (1 << bits), shape)
    codes = draw.astype(np.int8 if signed else np.uint8)
    assert pack(codes, bits).size == bits * -(-codes.size // 8)
    result = unpacked(codes, bits, optimize=optimize)
    assert result.dtype == codes.dtype and np.array_equal(result, codes)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("signed", [True, False])
def test_every_code_of_a_width_is_unpacked(bits: int, signed: bool) -> None:
    lowest = -(1 << (bits - 1)) if signed else 0
    codes = np.arange(lowest, lowest + (1 << bits)).astype(np.int8 if signed else np.uint8)
    assert np.array_equal(unpacked(codes, bits, optimize=True), codes)


class Odd(nn.Module):
    """Layers with numbers of weights not divisible by 8; the convolution is not a product."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.linear = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images ``(B, 3, 16, 16)`` to ``(B, 3)``."""
        return self.linear(self.conv(x).relu().mean((2, 3)))


@cache
def compiled(weight_bits: int) -> CompiledModel:
    return fxquant.compile(seeded(Block()), [tokens(6)], policies.minmax(weight_bits, 8))


def weight_codes(model: CompiledModel) -> dict[str, NDArray[np.int64]]:
    """The simulation's codes of each weight, as the file lays them out."""
    gm, found = model.graph_module, {}
    for edge in quantized_edges(gm):
        quantizer = submodule(gm, edge.source)
        if edge.arg is Arg.WEIGHT and isinstance(quantizer, UniformQuantizer):
            weight = constant(gm, operand(edge.source, 0))
            assert weight is not None
            codes = quantizer.quantize(weight).to(torch.int64)
            found[edge.name] = codes.t().numpy()
    return found


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], OnnxExport]:
    """Exports each model once for each target."""
    folder = tmp_path_factory.mktemp("files")
    return cache(
        lambda bits, target: compiled(bits).export_onnx(
            folder / f"{bits}_{target}.onnx", target=target
        )
    )


@pytest.mark.parametrize("bits", WIDTHS)
def test_kernels_and_codes_are_those_of_a_byte_a_code(
    bits: int, export: Callable[[int, str], OnnxExport], tmp_path: Path
) -> None:
    target = sorted(TARGETS)[bits % 2]
    exported, whole = export(bits, target), export(8, target)
    assert exported.fused == whole.fused and exported.unfused == ()
    expected = weight_codes(compiled(bits))
    assert exported.packed == {bits: sum(codes.size for codes in expected.values())}
    assert whole.packed == {} and f"of {bits} bits" in str(exported)
    file = onnx.load(str(exported.path))
    signed = target == "x86-vnni"
    kind = TensorProto.INT8 if signed else TensorProto.UINT8
    names = [f"{name}_codes" for name in expected]
    file.graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name in names)
    onnx.save(file, str(tmp_path / "more.onnx"))
    session = make_session(tmp_path / "more.onnx")
    results = session.run(names, {"images": tokens(1).numpy()})
    for theirs, ours in zip(results, expected.values(), strict=True):
        assert np.array_equal(theirs, ours if signed else ours + (1 << (bits - 1)))


@pytest.mark.parametrize("bits", [3, 7])
def test_the_file_computes_what_the_simulation_does(
    bits: int, export: Callable[[int, str], OnnxExport]
) -> None:
    assert_same_codes(compiled(bits), export(bits, "x86-avx2").path, tokens(6))


def test_weights_of_any_shape_are_packed(tmp_path: Path) -> None:
    images = torch.randn(6, 3, 16, 16)
    model = fxquant.compile(seeded(Odd()), [images], policies.minmax(5, 8))
    exported = model.export_onnx(tmp_path / "m.onnx")
    assert exported.packed == {5: 5 * 27 + 15}
    assert_same_codes(model, exported.path, images)


def mixed() -> Policy:
    """A width for each layer."""
    layers = {"attn.qkv": 7, "attn.proj": 3, "fc1": 2, "fc2": 6}
    rules = [
        Rule(
            path=f".*{path}.*",
            arg="weight",
            spec=TensorSpec(bits=bits, symmetric=True, granularity="channel"),
        )
        for path, bits in layers.items()
    ]
    return policies.w8a8().with_rules(*rules)


def test_the_doctor_says_what_is_packed(tmp_path: Path) -> None:
    model = fxquant.compile(seeded(Block()), [tokens(6)], mixed())
    for target, kind in (("x86-avx2", "uint"), ("x86-vnni", "int")):
        path = model.export_onnx(tmp_path / "m.onnx", target=target).path
        report = doctor(path)
        assert report.stored[f"packed {kind}7"] == 3 * DIM * DIM
        assert report.stored[f"packed {kind}3"] == DIM * DIM
        assert f"packed {kind}2" in str(report)
        assert report.fused["QGemm"] == 6 and report.unfused == ()


def test_a_code_that_is_unpacked_wrong_stops_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = packing._table
    monkeypatch.setattr(packing, "_table", lambda *args, **kw: right(*args, **kw)[::-1].copy())
    with refused(LoweringError, "differs from the simulation by") as caught:
        compiled(4).export_onnx(tmp_path / "m.onnx")
    assert caught.value.got.relative_l2 > 0.01
    assert list(tmp_path.iterdir()) == []
