"""Rewrites a FROZEN graph into the form that onnxruntime runs on integer kernels.

    quantizer(x)            dequantize_linear(quantize_linear(clip(x)))
    quantizer(W)            dequantize_linear(codes)
    linear(x, W, b)         addmm over flattened tokens, b as int32 codes: Gemm, fused to QGemm
    patch convolution       the same, on cut-out patches
    c * matmul(a, b)        matmul with c in the output scale of a's dequantize_linear
    softmax(quantizer(x))   softmax in float, of dequantize_linear(quantize_linear(x)); likewise
                            norms, activation functions and additions

The rewritten graph computes the same function, up to float rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import SymInt, Tensor, fx

from fxquant.backends.onnx_qdq.target import Target
from fxquant.backends.onnx_qdq.tensors import TensorWriter
from fxquant.config.vocabulary import Arg, OpKind
from fxquant.errors import LoweringError
from fxquant.graph.dialect import aten, elementwise_kind, op_kind
from fxquant.graph.edges import Edge, edges
from fxquant.graph.nodes import data_users, operand, rank, submodule
from fxquant.graph.rewrite import add_constant, emit
from fxquant.quantizers import UniformQuantizer

_QuantizedEdge = tuple[Edge, UniformQuantizer]


class Legalizer:
    """Rewrites one graph in place for one target.

    Args:
        gm: a copy of a FROZEN graph whose nodes carry shapes, its quantizers uniform
            (:func:`fxquant.backends.onnx_qdq.lowerings.rewrite_quantizers`).
        target: chooses the storage types.
    """

    def __init__(self, gm: fx.GraphModule, target: Target) -> None:
        self.gm, self.target = gm, target
        self._edges = {(edge.node, edge.arg): edge for edge in edges(gm)}
        self._write = TensorWriter(gm, target)

    @torch.no_grad()
    def run(self) -> dict[str, int]:
        """Rewrites every operation.

        Returns:
            Name of the tensor of a weight's codes -> their bit-width.

        Raises:
            LoweringError: onnxruntime has no form of a scale for each channel of an activation.
        """
        for node in list(self.gm.graph.nodes):
            kind = op_kind(node)
            with self.gm.graph.inserting_before(node):
                if kind is OpKind.MATMUL:
                    self._matmul(node)
                elif kind is not None:
                    self._weighted(node, kind)
                elif elementwise_kind(node) is not None:
                    self._elementwise(node)
        self.gm.graph.eliminate_dead_code()
        self.gm.delete_all_unused_submodules()
        self.gm.graph.lint()
        self.gm.recompile()
        return self._write.widths

    def _quantizer(self, node: fx.Node, arg: Arg) -> tuple[Edge, UniformQuantizer | None]:
        """An edge and its quantizer, which is None where the edge is float."""
        edge = self._edges[node, arg]
        module = submodule(self.gm, edge.source)
        return edge, module if isinstance(module, UniformQuantizer) else None

    def _call(self, target: Any, *args: Any, like: fx.Node) -> fx.Node:
        return emit(self.gm, target, *args, like=like)

    def _weighted(self, node: fx.Node, kind: OpKind) -> None:
        """Rewrites a linear or convolution."""
        x_edge, x = self._quantizer(node, Arg.INPUT)
        w_edge, w = self._quantizer(node, Arg.WEIGHT)
        if x is not None and x.axis is not None:
            raise LoweringError(
                f"{x_edge.name}: onnxruntime supports one scale for the input of a product with a "
                f"weight, got {x.scale.numel()}; use granularity tensor for this edge, "
                "or keep it float",
                edge=x_edge.name,
                got=x.scale.numel(),
                expected=1,
            )
        codes = None if x is None else self._write.codes(x_edge, x)
        if codes is not None and x is not None and w is not None:
            patch = patch_size(node) if kind is OpKind.CONV else None
            if patch is not None:
                self._replace(node, self._patches(node, (x_edge, x), (w_edge, w), codes, patch))
                return
            if kind is OpKind.LINEAR and rank(node) >= 2:
                self._replace(node, self._linear(node, (x_edge, x), (w_edge, w), codes))
                return
            bias, _ = self._write.bias(node, x, w)
            if bias is not None:
                node.update_arg(2, bias)
        if codes is not None and x is not None:
            x_edge.replace_source(self._write.activation(x_edge, x, codes))
        if w is not None:
            w_edge.replace_source(self._write.weight(w_edge, w, matrix=False))

    def _elementwise(self, node: fx.Node) -> None:
        """Rewrites a norm, softmax, activation function or addition: float, on quantized values."""
        for arg in (Arg.INPUT, Arg.LHS, Arg.RHS):
            if (node, arg) not in self._edges:
                continue
            edge, quantizer = self._quantizer(node, arg)
            if quantizer is not None:
                codes = self._write.codes(edge, quantizer)
                edge.replace_source(self._write.activation(edge, quantizer, codes))

    def _linear(
        self,
        node: fx.Node,
        x: _QuantizedEdge,
        w: _QuantizedEdge,
        codes: fx.Node,
    ) -> fx.Node:
        lead = self._sizes(codes)[:-1]
        width = codes.meta["val"].shape[-1]
        if rank(codes) > 2:
            codes = self._call(aten.reshape.default, codes, [-1, width], like=node)
        out = self._gemm(node, x, w, codes)
        if len(lead) == 1:
            return out
        return self._call(aten.reshape.default, out, [*lead, out.meta["val"].shape[-1]], like=node)

    def _gemm(
        self,
        node: fx.Node,
        x: _QuantizedEdge,
        w: _QuantizedEdge,
        codes: fx.Node,
    ) -> fx.Node:
        """Product of codes ``(M, K)`` with a weight, plus bias, ``(M, N)``."""
        value = self._write.activation(*x, codes)
        weight = self._write.weight(*w, matrix=True)
        bias, coded = self._write.bias(node, x[1], w[1])
        if bias is not None and coded:
            return self._call(aten.addmm.default, bias, value, weight, like=node)
        product = self._call(aten.mm.default, value, weight, like=node)
        return product if bias is None else self._call(aten.add.Tensor, product, bias, like=node)

    def _patches(
        self,
        node: fx.Node,
        x: _QuantizedEdge,
        w: _QuantizedEdge,
        codes: fx.Node,
        patch: tuple[int, int],
    ) -> fx.Node:
        """Rewrites a convolution whose kernel tiles the image as a product over its patches.

        The integer convolution of onnxruntime needs a quantized output; the product does not.
        """

        def call(target: Any, *args: Any) -> fx.Node:
            return self._call(target, *args, like=node)

        batch, channels, height, width = self._sizes(codes)
        rows, columns = height // patch[0], width // patch[1]
        cut = call(
            aten.reshape.default, codes, [batch, channels, rows, patch[0], columns, patch[1]]
        )
        cut = call(aten.permute.default, cut, [0, 2, 4, 1, 3, 5])
        cut = call(aten.reshape.default, cut, [-1, channels * patch[0] * patch[1]])
        out = self._gemm(node, x, w, cut)
        shape = [batch, rows, columns, out.meta["val"].shape[-1]]
        return call(aten.permute.default, call(aten.reshape.default, out, shape), [0, 3, 1, 2])

    def _matmul(self, node: fx.Node) -> None:
        """Rewrites a product of two activations; a scalar factor behind it joins a scale."""
        operands = [self._quantizer(node, arg) for arg in (Arg.LHS, Arg.RHS)]
        scaling = _scaling(node)
        quantized = all(quantizer is not None for _, quantizer in operands)
        factor = float(scaling.args[1]) if scaling is not None and quantized else 1.0  # type: ignore[arg-type]
        head_scales: Tensor | None = None
        for edge, quantizer in operands:
            if quantizer is None:
                continue
            codes = self._write.codes(edge, quantizer)
            edge_factor = factor if edge.arg is Arg.LHS else 1.0
            edge.replace_source(self._write.activation(edge, quantizer, codes, edge_factor))
            if quantizer.axis is not None:
                heads = quantizer.scale.view(-1, 1, 1)
                head_scales = heads if head_scales is None else head_scales * heads
        out = node
        if head_scales is not None:
            with self.gm.graph.inserting_after(node):
                heads_node = add_constant(self.gm, head_scales, f"{node.name}_heads", like=node)
            with self.gm.graph.inserting_after(heads_node):
                out = self._call(aten.mul.Tensor, node, heads_node, like=node)
            node.replace_all_uses_with(out, delete_user_cb=lambda user: user is not out)
        if factor != 1.0 and scaling is not None:
            scaling.replace_all_uses_with(out)

    def _sizes(self, node: fx.Node) -> list[Any]:
        """Sizes of a node's tensor: numbers, or nodes where sizes are symbolic."""
        return [
            self._call(aten.sym_size.int, node, axis, like=node) if isinstance(n, SymInt) else n
            for axis, n in enumerate(node.meta["val"].shape)
        ]

    def _replace(self, node: fx.Node, new: fx.Node) -> None:
        node.replace_all_uses_with(new)
        self.gm.graph.erase_node(node)


def _scaling(node: fx.Node) -> fx.Node | None:
    """The multiplication by a positive scalar that is a product's only user; None without one."""
    users = data_users(node)
    if len(users) != 1 or users[0].target is not aten.mul.Tensor:
        return None
    factor = users[0].args[1]
    positive = isinstance(factor, int | float) and factor > 0
    return users[0] if positive and users[0].args[0] is node else None


def patch_size(node: fx.Node) -> tuple[int, int] | None:
    """Kernel size of a 2-D convolution whose kernel tiles the image, else None."""
    if node.target is not aten.conv2d.default:
        return None
    defaults: tuple[Any, ...] = (None, [1, 1], [0, 0], [1, 1], 1)
    arguments = (*node.args[2:], *defaults[len(node.args) - 2 :])
    _, stride, padding, dilation, groups = arguments
    shape = operand(node, 0).meta["val"].shape
    weight = operand(operand(node, 1), 0).meta["val"].shape
    kernel = [int(n) for n in weight[2:]]
    fixed = not any(isinstance(n, SymInt) for n in shape[1:])
    tiles = fixed and all(n % k == 0 for n, k in zip(shape[2:], kernel, strict=True))
    plain = set(padding) == {0} and set(dilation) == {1} and groups == 1
    if not (tiles and plain and list(stride) == kernel):
        return None
    return kernel[0], kernel[1]
