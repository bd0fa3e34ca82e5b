"""A small QDQ file, right or wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

K, N = 32, 16


def gemm_file(path: Path, *, bias_factor: float = 1.0, int8_input: bool = False) -> Path:
    """A QDQ Gemm; a bias_factor other than one is the error that onnxruntime overlooks."""
    random = np.random.default_rng(0)
    x_type = np.int8 if int8_input else np.uint8
    constants = {
        "x_scale": np.float32(0.02),
        "x_zero": x_type(0 if int8_input else 128),
        "w": random.integers(0, 256, (K, N)).astype(np.uint8),
        "w_scale": np.full(N, 0.01, np.float32),
        "w_zero": np.full(N, 128, np.uint8),
        "b": random.integers(-9000, 9000, N).astype(np.int32),
        "b_scale": np.full(N, 0.02 * 0.01 * bias_factor, np.float32),
        "b_zero": np.zeros(N, np.int32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "x_scale", "x_zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wd"], axis=1),
        helper.make_node("DequantizeLinear", ["b", "b_scale", "b_zero"], ["bd"], axis=0),
        helper.make_node("Gemm", ["xd", "wd", "bd"], ["y"], name="gemm"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", N])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path
