"""What is taken out of a file: nothing that changes a number or a kernel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from fxquant.backends.onnx_qdq import doctor, make_session
from fxquant.backends.onnx_qdq.compact import compact
from fxquant.backends.onnx_qdq.rules import check_rules
from fxquant.errors import LoweringError
from tests.helpers import compiled
from tests.helpers.qdq_files import K, gemm_file
from tests.helpers.refusals import refused


def compacted(source: Path, path: Path) -> onnx.ModelProto:
    model = ir.load(source)
    compact(model)
    check_rules(model)
    ir.save(model, path)
    return onnx.load(str(path))


def outputs(path: Path, *, optimize: bool) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((5, K)).astype(np.float32)
    return np.asarray(make_session(path, optimize=optimize).run(None, {"x": x})[0])


def test_the_scale_of_a_bias_is_computed_from_the_two_others(tmp_path: Path) -> None:
    before, after = gemm_file(tmp_path / "before.onnx"), tmp_path / "after.onnx"
    file = compacted(before, after)
    names = {tensor.name for tensor in file.graph.initializer}
    assert names == {"x_scale", "x_zero", "w", "w_scale", "w_zero", "b"}
    assert [node.op_type for node in file.graph.node].count("Mul") == 1
    assert doctor(after).fused == doctor(before).fused == {"QGemm": 1}
    for optimize in (True, False):
        assert np.array_equal(outputs(before, optimize=optimize), outputs(after, optimize=optimize))


def test_a_scale_that_is_no_product_is_left_and_refused(tmp_path: Path) -> None:
    model = ir.load(gemm_file(tmp_path / "m.onnx", bias_factor=3.0))
    compact(model)
    assert "b_scale" in model.graph.initializers
    with refused(LoweringError, "product of the two scales", edge="gemm"):
        check_rules(model)


def test_a_product_of_other_scales_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    compacted(gemm_file(path), path)
    model = ir.load(path)
    (unit,) = (node for node in model.graph if node.op_type == "Mul")
    unit.replace_input_with(0, unit.inputs[1])
    with refused(LoweringError, "product of the two scales", edge="gemm"):
        check_rules(model)


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    path = gemm_file(tmp_path / "m.onnx")
    once = compacted(path, path).SerializeToString()
    assert compacted(path, path).SerializeToString() == once


def test_an_exported_file_holds_nothing_that_can_be_derived(tmp_path: Path) -> None:
    model = compiled.block()
    file = onnx.load(str(model.export_onnx(tmp_path / "m.onnx").path))
    assert not file.graph.value_info
    units = [n for n in file.graph.node if n.op_type == "Mul"]
    assert len(units) == 6  # q, k, v, proj, fc1, fc2
    assert not [t.name for t in file.graph.initializer if "bias_scale" in t.name]
    for node in file.graph.node:
        schema = onnx.defs.get_schema(node.op_type, 21)
        defaults = {name: a.default_value for name, a in schema.attributes.items()}
        assert not [a.name for a in node.attribute if a == defaults[a.name]]
