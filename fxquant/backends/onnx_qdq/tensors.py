"""Writer of single quantized tensors in ONNX's terms: activations, weights, biases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.onnx_qdq.target import Target
from fxquant.backends.onnx_qdq.torch_ops import DEQUANTIZE, QUANTIZE
from fxquant.config.vocabulary import Arg, OpKind
from fxquant.errors import LoweringError
from fxquant.graph.dialect import aten
from fxquant.graph.edges import Edge
from fxquant.graph.nodes import constant, operand
from fxquant.graph.rewrite import add_constant, emit
from fxquant.quantizers import INT32_MAX, UniformQuantizer, accumulator_scale


class TensorWriter:
    """Adds nodes for quantized tensors to a graph, at its insertion point.

    Args:
        gm: a graph whose nodes carry shapes.
        target: chooses the storage types.
    """

    def __init__(self, gm: fx.GraphModule, target: Target) -> None:
        self._gm, self._target = gm, target
        # (quantizer call, storage type) -> codes, so that a value is quantized once.
        self._shared: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        # (quantizer call, storage type, as a matrix) -> codes, scale and zero_point of a weight,
        # which several products may read, such as the products of a twin quantizer's two regions.
        self._weights: dict[tuple[fx.Node, torch.dtype, bool], list[fx.Node]] = {}
        # Name of a weight's codes -> their bit-width.
        self.widths: dict[str, int] = {}

    def _constant(self, value: Tensor, name: str, like: fx.Node) -> fx.Node:
        return add_constant(self._gm, value, name, like=like)

    def _call(self, target: Any, *args: Any, like: fx.Node) -> fx.Node:
        return emit(self._gm, target, *args, like=like)

    def _shift(self, quantizer: UniformQuantizer, storage: torch.dtype) -> int:
        """Offset of stored codes: half the range where code and storage type differ in sign."""
        signed = torch.iinfo(storage).min < 0
        return (int(quantizer.signed) - int(signed)) << (quantizer.bits - 1)

    def codes(self, edge: Edge, quantizer: UniformQuantizer) -> fx.Node:
        """Integer codes of an activation, which is divided by a scale per head first."""
        right = edge.arg is Arg.RHS and edge.kind.is_product
        storage = self._target.storage(right=right, bits=quantizer.bits)
        if edge.kind is OpKind.SOFTMAX:
            # After codes of 8 bits onnxruntime uses a quantized softmax, which is not exact: it
            # changes one code in a hundred.
            storage = torch.uint16
        key = (edge.source, storage)
        if key in self._shared:
            return self._shared[key]
        like, x = edge.node, operand(edge.source, 0)
        with self._gm.graph.inserting_before(edge.source):
            scale, zero = quantizer.scale, quantizer.zero_point
            if quantizer.axis is not None:
                x = self._divided(edge, quantizer, x)
                scale, zero = torch.ones(()), torch.zeros(())
            if quantizer.bits != torch.iinfo(storage).bits:
                ends = (quantizer.qmin, quantizer.qmax)
                low, high = ((end - float(zero)) * float(scale) for end in ends)
                x = self._call(aten.clamp.default, x, low, high, like=like)
            point = (zero + self._shift(quantizer, storage)).to(storage)
            stored = self._constant(scale, f"{edge.name}_scale", like)
            stored_point = self._constant(point, f"{edge.name}_zero_point", like)
            codes = self._call(QUANTIZE, x, stored, stored_point, like=like)
        self._shared[key] = codes
        return codes

    def _divided(self, edge: Edge, quantizer: UniformQuantizer, x: fx.Node) -> fx.Node:
        """Divides ``x`` by its scale per head, and adds the zero_point per head to what is rounded.

        The zero_point comes after the rounding, as in QuantizeLinear: a tie would otherwise go to
        another code where the zero_point is odd.
        """
        if quantizer.axis != -3:
            raise LoweringError(
                f"{edge.name}: a scale per channel of an activation fails in onnxruntime; use "
                "granularity tensor or head for this edge, or keep it float",
                edge=edge.name,
                got=quantizer.axis,
                expected=-3,
            )
        heads = self._constant(quantizer.scale.view(-1, 1, 1), f"{edge.name}_heads", edge.node)
        x = self._call(aten.div.Tensor, x, heads, like=edge.node)
        if bool((quantizer.zero_point != 0).any()):
            points = quantizer.zero_point.view(-1, 1, 1)
            offset = self._constant(points, f"{edge.name}_points", edge.node)
            rounded = self._call(aten.round.default, x, like=edge.node)
            x = self._call(aten.add.Tensor, rounded, offset, like=edge.node)
        return x

    def activation(
        self, edge: Edge, quantizer: UniformQuantizer, codes: fx.Node, factor: float = 1.0
    ) -> fx.Node:
        """Float value of codes times ``factor``, in units of the scales per head, if any."""
        like = edge.node
        per_head = quantizer.axis is not None
        scale = torch.ones(()) if per_head else quantizer.scale
        zero = torch.zeros(()) if per_head else quantizer.zero_point
        storage = codes.meta["val"].dtype
        point = (zero + self._shift(quantizer, storage)).to(storage)
        value = self._call(
            DEQUANTIZE,
            codes,
            self._constant(scale * factor, f"{edge.name}_scale", like),
            self._constant(point, f"{edge.name}_zero_point", like),
            None,
            like=like,
        )
        if per_head and bool((quantizer.zero_point != 0).any()):
            points = self._constant(
                factor * quantizer.zero_point.view(-1, 1, 1), f"{edge.name}_points", like
            )
            value = self._call(aten.sub.Tensor, value, points, like=like)
        return value

    def weight(
        self, edge: Edge, quantizer: UniformQuantizer, *, matrix: bool, right: bool = True
    ) -> fx.Node:
        """Float value of a weight stored as codes.

        Args:
            edge: the weight's edge.
            quantizer: quantizer of the weight.
            matrix: whether to store the weight as ``(K, N)`` with the scale along axis 1; otherwise
                in the weight's shape.
            right: whether the weight multiplies a quantized activation, for which it has the
                target's type.
        """
        storage = self._target.storage(right=right, bits=quantizer.bits)
        key = (edge.source, storage, matrix)
        if key not in self._weights:
            self._weights[key] = self._weight_constants(edge, quantizer, storage, matrix=matrix)
        axis = None if quantizer.axis is None else int(matrix)
        return self._call(DEQUANTIZE, *self._weights[key], axis, like=edge.node)

    def _weight_constants(
        self, edge: Edge, quantizer: UniformQuantizer, storage: torch.dtype, *, matrix: bool
    ) -> list[fx.Node]:
        """Adds codes, scale and zero_point of a weight as constants."""
        weight = constant(self._gm, operand(edge.source, 0))
        assert weight is not None
        shift = self._shift(quantizer, storage)
        codes = (quantizer.quantize(weight) + shift).to(storage)
        points = (quantizer.zero_point + shift).to(storage)
        stored = self._constant(
            codes.flatten(1).t() if matrix else codes, f"{edge.name}_codes", edge.node
        )
        self.widths[str(stored.target)] = quantizer.bits
        return [
            stored,
            self._constant(quantizer.scale, f"{edge.name}_scale", edge.node),
            self._constant(points, f"{edge.name}_zero_point", edge.node),
        ]

    def bias(
        self, node: fx.Node, x: UniformQuantizer, w: UniformQuantizer
    ) -> tuple[fx.Node | None, bool]:
        """Float value of a product's bias, and whether the bias is stored as int32 codes.

        onnxruntime assumes units of ``s_x s_w`` for int32 biases and ignores their scale, so that
        no other scale may ever be written.
        """
        argument = node.args[2] if len(node.args) > 2 else None
        bias = constant(self._gm, argument)
        if not isinstance(argument, fx.Node):
            return None, False
        if bias is None:
            return argument, False
        unit = accumulator_scale(x, w)
        codes = torch.round(bias.double() / unit.double())
        if bool((codes.abs() >= INT32_MAX).any()):
            return argument, False
        unit = unit.expand_as(bias)
        value = self._call(
            DEQUANTIZE,
            self._constant(codes.to(torch.int32), f"{node.name}_bias_codes", node),
            self._constant(unit, f"{node.name}_bias_scale", node),
            self._constant(
                torch.zeros_like(unit, dtype=torch.int32), f"{node.name}_bias_zero", node
            ),
            0,
            like=node,
        )
        return value, True
