"""Removes from a finished model everything that onnxruntime does not need or computes itself.

    notes, shapes of inner values  removed: stack traces, and results of shape inference
    attributes with default value  removed
    DequantizeLinear(bias, s, 0)   DequantizeLinear(bias, Mul(s_x, s_w)) where s = s_x s_w

The scale of a bias is as large as the bias; onnxruntime computes the product of the scales when it
makes the session, before it selects integer kernels.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from fxquant.backends.onnx_qdq.rules import constant_value, dequantizer


def compact(model: ir.Model) -> None:
    """Rewrites a QDQ model in place; the results of the model stay the same to the bit."""
    for product in list(model.graph):
        if product.op_type in ("Gemm", "Conv") and len(product.inputs) > 2:
            _derive_bias_scale(product)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        _drop_defaults(node, model.graph.opset_imports[""])
        _strip(node)
    for name, value in list(model.graph.initializers.items()):
        _forget(value)
        if not value.uses() and not value.is_graph_output():
            model.graph.initializers.pop(name)
    for value in model.graph.inputs:
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_name = "fxquant"


def _derive_bias_scale(product: ir.Node) -> None:
    x, w, bias = map(dequantizer, product.inputs[:3])
    if x is None or w is None or bias is None or len(bias.inputs) < 3:
        return
    factors = [x.inputs[1], w.inputs[1]]
    scale, first, second = map(constant_value, (bias.inputs[1], *factors))
    if scale is None or first is None or second is None:
        return
    if np.array_equal(scale, first * second):
        unit = ir.node("Mul", factors)
        bias.prepend(unit)
        bias.replace_input_with(1, unit.outputs[0])
        bias.resize_inputs(2)  # ONNX has no zero_point other than 0 for int32


def _drop_defaults(node: ir.Node, opset: int) -> None:
    if not onnx.defs.has(node.op_type, node.domain):
        return
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    for name, attribute in list(node.attributes.items()):
        if ir.to_proto(attribute) == schema.attributes[name].default_value:
            node.attributes.pop(name)


def _strip(node: ir.Node) -> None:
    """Removes the exporter's notes, which contain paths of this machine, and inner shapes."""
    node.metadata_props.clear()
    node.doc_string = None
    for value in node.outputs:
        _forget(value)


def _forget(value: ir.Value) -> None:
    value.metadata_props.clear()
    if not value.is_graph_output():
        value.shape = value.type = None
