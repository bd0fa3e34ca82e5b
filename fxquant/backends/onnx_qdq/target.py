"""Targets: CPU families that files are made for, and the storage types of each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper

from fxquant.errors import LoweringError
from fxquant.utils.suggest import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Target:
    """A family of CPUs.

    Attributes:
        name: name of the target, as passed to ``export_onnx``.
        signed_weights: whether weights and right operands are int8; otherwise they are uint8 with
            the zero_point moved by 128.
        description: one sentence about the target.
    """

    name: str
    signed_weights: bool
    description: str

    def storage(self, *, right: bool, bits: int) -> torch.dtype:
        """Storage type of codes.

        Args:
            right: whether the tensor is a weight or the right operand of a matmul.
            bits: bit-width of the codes.
        """
        if right and self.signed_weights:
            return torch.int8 if bits <= 8 else torch.int16
        return torch.uint8 if bits <= 8 else torch.uint16


# VNNI and AMX multiply only uint8 by int8; other combinations of types are 8 to 45 times slower.
VNNI = Target(
    name="x86-vnni",
    signed_weights=True,
    description="x86-64 with AVX-VNNI, AVX512-VNNI or AMX: uint8 activations, int8 weights",
)
# Without VNNI onnxruntime's uint8 x int8 kernel adds pairs of products in 16 bits, which overflow.
AVX2 = Target(
    name="x86-avx2",
    signed_weights=False,
    description="x86-64 without VNNI: uint8 activations and weights, whose kernel is exact there",
)
TARGETS = {target.name: target for target in (VNNI, AVX2)}


def resolve_target(name: str) -> Target:
    """Looks a target up by name; ``auto`` is the target of this machine.

    Raises:
        LoweringError: no target has this name.
    """
    if name == "auto":
        return AVX2 if u8s8_saturates() else VNNI
    if name not in TARGETS:
        known = ("auto", *TARGETS)
        raise LoweringError(
            f"no target {name!r}{did_you_mean(name, known)}; one of {', '.join(known)}",
            got=name,
            expected=known,
        )
    return TARGETS[name]


@cache
def u8s8_saturates() -> bool:
    """Whether this machine's uint8 x int8 product overflows 16 bits, measured on one product."""
    k, n = 64, 16
    constants = [
        numpy_helper.from_array(np.full((k, n), 127, np.int8), "w"),
        numpy_helper.from_array(np.zeros((), np.uint8), "zx"),
        numpy_helper.from_array(np.zeros((), np.int8), "zw"),
    ]
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w", "zx", "zw"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, k])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [1, n])],
        constants,
    )
    opsets = [helper.make_opsetid("", 21)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (product,) = session.run(None, {"x": np.full((1, k), 255, np.uint8)})
    return bool((product != k * 255 * 127).any())
