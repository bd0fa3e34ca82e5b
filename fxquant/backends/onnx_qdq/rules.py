"""Checks of the rules that keep a finished QDQ model fast and correct in onnxruntime.

onnxruntime fuses some wrong models without a warning: it treats a bias whose scale is not
``s_x s_w`` as if its scale were ``s_x s_w``, and a weight scale along the summed axis as if the
scale ran along the output. The legalizer never writes such models; this check proves it for each
file.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from fxquant.errors import LoweringError


def check_rules(model: ir.Model) -> None:
    """Checks every quantized product.

    Raises:
        LoweringError: a product breaks a rule, which is a bug in this backend.
    """
    for node in model.graph:
        if node.op_type in ("Gemm", "MatMul", "Conv"):
            violation = _violation(node)
            if violation:
                raise LoweringError(
                    f"{node.name} ({node.op_type}): {violation}. This is a bug", edge=node.name
                )


def _violation(node: ir.Node) -> str | None:
    """A clause that names the rule that a product breaks; None where it breaks no rule."""
    x, w = (dequantizer(value) for value in node.inputs[:2])
    if x is None or w is None:
        return None
    x_scale, w_scale = constant_value(x.inputs[1]), constant_value(w.inputs[1])
    if x_scale is None or w_scale is None:
        return "a scale is not a constant"
    if x_scale.size != 1:
        return "an activation has more than one scale, which fails at run time"
    output_axis = 0 if node.op_type == "Conv" else 1
    if w_scale.ndim and _axis(w) != output_axis:
        return f"the weight's scale runs along axis {_axis(w)}, not the output's {output_axis}"
    bias = dequantizer(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is not None:
        unit = constant_value(bias.inputs[1])
        if unit is None or not np.allclose(unit, x_scale * w_scale, rtol=1e-6, atol=0):
            return "the bias is not in units of the product of the two scales"
    return None


def dequantizer(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that yields a value; None where another node yields it."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _axis(node: ir.Node) -> int:
    attribute = node.attributes.get("axis")
    return 1 if attribute is None else int(attribute.as_int())


def constant_value(value: ir.Value | None) -> np.ndarray | None:
    """Numbers of a constant or of a product of constants; None for any other value."""
    if value is None:
        return None
    node = value.producer()
    if node is not None and node.op_type == "Mul":
        first, second = map(constant_value, node.inputs)
        return None if first is None or second is None else first * second
    constant = ir.convenience.get_const_tensor(value)
    return None if constant is None else np.asarray(constant.numpy())
