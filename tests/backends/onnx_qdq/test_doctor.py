"""The doctor finds what onnxruntime gets wrong without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fxquant.backends.onnx_qdq import doctor
from fxquant.backends.onnx_qdq.difference import TOLERANCE, compare, relative_difference
from fxquant.backends.onnx_qdq.rules import check_rules
from fxquant.errors import FileFormatError, LoweringError
from tests.helpers.qdq_files import K, N, gemm_file
from tests.helpers.refusals import refused


def test_a_right_file_is_ok(tmp_path: Path) -> None:
    report = doctor(gemm_file(tmp_path / "m.onnx"))
    assert report.ok and report.fused == {"QGemm": 1} and report.unfused == ()
    assert report.quantizers == (1, 3) and report.opset == 21
    assert report.stored == {"uint8": K * N, "int32": N}
    assert "QGemm" in str(report) and "ok" in str(report)


def test_a_bias_in_the_wrong_unit_is_found(tmp_path: Path) -> None:
    report = doctor(gemm_file(tmp_path / "m.onnx", bias_factor=3.0))
    assert not report.ok and report.difference.relative_l2 > 0.05
    assert "WRONG" in str(report)


def test_the_exporter_refuses_what_the_doctor_would_find(tmp_path: Path) -> None:
    import onnx_ir

    path = gemm_file(tmp_path / "m.onnx", bias_factor=3.0)
    with refused(LoweringError, "product of the two scales", edge="gemm"):
        check_rules(onnx_ir.load(path))
    check_rules(onnx_ir.load(gemm_file(path)))


def test_the_exporter_refuses_a_scale_along_the_summed_axis(tmp_path: Path) -> None:
    import onnx_ir

    path = gemm_file(tmp_path / "m.onnx")
    model = onnx.load(str(path))
    model.graph.node[2].attribute[0].i = 0
    onnx.save(model, str(path))
    with refused(LoweringError, "axis 0", edge="gemm"):
        check_rules(onnx_ir.load(path))


def test_data_of_the_users_is_used(tmp_path: Path) -> None:
    path = gemm_file(tmp_path / "m.onnx")
    assert doctor(path, np.ones((3, K), np.float32)).ok
    with refused(FileFormatError, r"does not run on inputs of shape", got=path):
        doctor(path, np.ones((3, K + 1), np.float32))


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x0a" * 9])
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with refused(FileFormatError, "truncated or of another format", got=path):
        doctor(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = gemm_file(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[:-40])
    with refused(FileFormatError, "truncated", got=path):
        doctor(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.onnx"
    with refused(FileFormatError, "cannot read", got=path):
        doctor(path)


def one_node(path: Path, node: onnx.NodeProto, kind: int, shape: list[str | int]) -> Path:
    """A file of one operator from ``x`` to ``y``, both of that type."""
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, [f"y{axis}" for axis in range(len(shape))])],
    )
    opsets = [helper.make_opsetid(node.domain, 21 if node.domain == "" else 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path


@pytest.mark.parametrize(
    "kind", ["FLOAT16", "FLOAT", "DOUBLE", "INT8", "UINT8", "INT16", "UINT32", "INT64", "BOOL"]
)
def test_inputs_of_every_type_are_fed(tmp_path: Path, kind: str) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    path = one_node(tmp_path / "m.onnx", node, getattr(TensorProto, kind), ["batch", 3])
    assert doctor(path).difference.relative_l2 == 0
    if kind in ("FLOAT16", "DOUBLE"):
        assert doctor(path, np.ones((2, 3), np.float32)).ok


def test_an_input_without_numbers_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    path = one_node(tmp_path / "m.onnx", node, TensorProto.STRING, ["batch"])
    text = r"input x is a tensor\(string\).*one of tensor"
    with refused(FileFormatError, text, edge="x", got="tensor(string)") as caught:
        doctor(path)
    assert "tensor(float)" in caught.value.expected


def test_a_file_without_the_default_operators_is_examined(tmp_path: Path) -> None:
    node = helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")
    report = doctor(one_node(tmp_path / "m.onnx", node, TensorProto.FLOAT, ["batch", 3]))
    assert report.ok and report.opset == 0 and "opset none" in str(report)


def test_equal_infinities_are_no_difference(tmp_path: Path) -> None:
    node = helper.make_node("Log", ["x"], ["y"])
    path = one_node(tmp_path / "m.onnx", node, TensorProto.FLOAT, ["batch", 3])
    assert doctor(path, np.array([[0, 1, 2]], np.float32)).difference.relative_l2 < 1e-6


def test_sizes_left_open_lead_to_real_images(tmp_path: Path) -> None:
    node = helper.make_node("DepthToSpace", ["x"], ["y"], blocksize=2)
    shape: list[str | int] = ["batch", "channels", 4, 4]
    path = one_node(tmp_path / "m.onnx", node, TensorProto.FLOAT, shape)
    with refused(FileFormatError, r"x, axis 1.*for which 2 was taken.*--data", got=path):
        doctor(path)
    assert doctor(path, np.ones((1, 4, 4, 4), np.float32)).ok


@pytest.mark.parametrize(
    ("values", "plain", "difference"),
    [
        ([3.0, 4.0], [3.0, 0.0], 4 / 3),
        ([np.inf, 1.0], [np.inf, 1.0], 0.0),
        ([np.nan, 1.0], [np.nan, 2.0], 0.5),
        ([np.inf, 1.0], [5.0, 1.0], np.inf),
        ([1e-6, 0.0], [0.0, 0.0], TOLERANCE),
        ([0.0, 1e-9], [0.0, -1e-9], 1e-4),
    ],
)
def test_the_difference_of_outputs(
    values: list[float], plain: list[float], difference: float
) -> None:
    assert relative_difference(np.array(values), np.array(plain)) == pytest.approx(difference)


def test_a_number_missing_on_one_side_is_never_ok() -> None:
    assert not relative_difference(np.array([np.nan]), np.array([1.0])) <= TOLERANCE
    assert not relative_difference(np.array([1.0]), np.array([np.nan])) <= TOLERANCE


def test_rounding_explains_a_difference_only_where_noise_makes_the_like() -> None:
    images = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)

    def chaotic(x: Any) -> list[Any]:
        return [np.sin(1e6 * x.astype(np.float64))]

    def calm(x: Any) -> list[Any]:
        return [x.astype(np.float64)]

    plain = chaotic(images)
    found = compare([plain[0] * 1.3], plain, images, chaotic)
    assert found.relative_l2 == pytest.approx(0.3) and found.ties > 0.3 and found.ok
    assert "round differently" in str(found)
    assert not compare([plain[0][::-1]], plain, images, chaotic).ok
    assert not compare([plain[0] * 0], plain, images, chaotic).ok
    found = compare([images * 1.3], calm(images), images, calm)
    assert found.relative_l2 == pytest.approx(0.3) and 0 < found.ties < 1e-4 and not found.ok
    found = compare([images * 1.01], calm(images), images, calm)
    assert found.ok and found.ties == 0 and "round" not in str(found)
