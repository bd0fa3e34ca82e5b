"""Rewrites twin quantizers as uniform quantizers, the only quantizers that QDQ has.

    twin(x)                     where one grid of step D_R1 and 8-bit codes holds all values:
                                uniform(where(x > t, coarse(x), x), D_R1)
    product(twin(x), W, b)      otherwise
                                product(low(x), W, b) + product(high(x), W)

``coarse`` is a pair of quantize_linear and dequantize_linear of scale ``D_R2 = 2^m D_R1``, so that
its values are whole numbers of steps ``D_R1`` and the quantizer behind it is exact; ``low`` and
``high`` are uniform quantizers of the magnitudes in the fine and in the coarse region (arXiv
2111.12293, section 4.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.onnx_qdq.legalize import patch_size
from fxquant.backends.onnx_qdq.torch_ops import DEQUANTIZE, QUANTIZE
from fxquant.config.vocabulary import OpKind
from fxquant.graph.dialect import aten
from fxquant.graph.edges import Edge, edges
from fxquant.graph.nodes import operand, submodule
from fxquant.graph.rewrite import add_constant, emit
from fxquant.quantizers import Quantizer, TwinUniformQuantizer, UniformQuantizer
from fxquant.quantizers.ops import twin_threshold

# Points of a grid that 8-bit codes can number.
_BYTE_CODES = 256


@dataclass(frozen=True, kw_only=True)
class TwinForm:
    """Form in which a twin quantizer is written.

    Attributes:
        edge: name of the quantizer's edge.
        levels: number of points of the plain grid with the fine step that holds all its values.
        products: number of integer products that each product with the quantizer becomes; 0 where
            only float operations read it.
        max_shift: largest ``TensorSpec.max_shift`` with which it is one product; None where no
            bound suffices.
    """

    edge: str
    levels: int
    products: int
    max_shift: int | None

    def __str__(self) -> str:
        """The form as one sentence."""
        if self.products == 1:
            return f"{self.edge}: {self.levels:,} levels: one product"
        text = f"{self.edge}: codes need {self.levels:,} levels: "
        if self.products == 0:
            return (
                text + "its values in float, as onnxruntime has no integer kernel for its product"
            )
        bound = self.max_shift
        advice = "fewer bits" if bound is None else f"max_shift={bound} or fewer bits"
        return f"{text}two products ({advice} would make it one)"


def rewrite_twin(gm: fx.GraphModule, node: fx.Node, quantizer: TwinUniformQuantizer) -> TwinForm:
    """Rewrites one twin quantizer in place.

    Args:
        gm: a copy of a FROZEN graph whose nodes carry shapes.
        node: call of the quantizer.
        quantizer: the quantizer.
    """
    products = _TwinRewrite(gm, node, quantizer).rewrite()
    return TwinForm(
        edge=_edge_name(node),
        levels=quantizer.grid_size,
        products=products,
        max_shift=_largest_shift(quantizer),
    )


class _TwinRewrite:
    """Rewriting of one call of a twin quantizer."""

    def __init__(self, gm: fx.GraphModule, node: fx.Node, quantizer: TwinUniformQuantizer) -> None:
        self.gm, self.node, self.quantizer = gm, node, quantizer
        self.x = operand(node, 0)

    def rewrite(self) -> int:
        """Rewrites the call; returns the number of integer products that a product becomes."""
        if self.quantizer.fits_byte:
            self._snap()
            return 1
        products = 0
        # A product whose two operands are one value has two such edges, and its copy has two too.
        while edge := next((e for e in edges(self.gm) if e.source is self.node), None):
            if _multiplies_codes(self.gm, edge):
                self._split(edge)
                products = 2
            else:
                edge.replace_source(self._value)
        self.gm.graph.erase_node(self.node)
        return products

    def _snap(self) -> None:
        """Rounds values above the threshold to the coarse grid, then all to the fine grid."""
        with self.gm.graph.inserting_before(self.node):
            snapped = self._call(aten.where.self, self._is_coarse, self._coarse, self._fine)
        self.node.update_arg(0, snapped)
        zero = self.quantizer.grid_zero_point
        uniform = unsigned(self.quantizer.scale, zero, bits=8)
        self.gm.set_submodule(str(self.node.target), uniform)

    def _split(self, edge: Edge) -> None:
        """Replaces a product by the sum of products with each region; the first has the bias."""
        low, graph = edge.node, self.gm.graph
        args = list(low.args)
        if edge.kind is not OpKind.MATMUL and len(args) > 2:
            args[2] = None
        with graph.inserting_after(low):
            high = graph.create_node(
                low.op, low.target, tuple(args), dict(low.kwargs), f"{low.name}_high"
            )
        high.meta = dict(low.meta)
        with graph.inserting_after(high):
            total = emit(self.gm, aten.add.Tensor, low, high, like=low)
        low.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
        edge.replace_source(self._regions[0])
        Edge(high, edge.arg).replace_source(self._regions[1])

    @cached_property
    def _regions(self) -> tuple[fx.Node, fx.Node]:
        """Uniform quantizers of the magnitudes in the fine and in the coarse region."""
        twin, inputs = self.quantizer, (self.x, self.x)
        with self.gm.graph.inserting_before(self.node):
            if (
                not twin.two_sided
            ):  # in two-sided codes both grids end at zero, which separates them
                zero = self._constant(torch.zeros(()), "zero")
                inputs = (
                    self._call(aten.where.self, self._is_coarse, zero, self.x),
                    self._call(aten.where.self, self._is_coarse, self.x, zero),
                )
            bits = twin.bits - 1
            low = unsigned(twin.scale, twin.grid_zero_point, bits=bits)
            high = unsigned(twin.coarse_scale, 0, bits=bits)
            return self._quantizer("low", low, inputs[0]), self._quantizer("high", high, inputs[1])

    @cached_property
    def _value(self) -> fx.Node:
        """Float values of the quantizer."""
        twin = self.quantizer
        with self.gm.graph.inserting_before(self.node):
            fine = self._rounded(self._fine, twin.scale, twin.grid_zero_point, "fine")
            return self._call(aten.where.self, self._is_coarse, self._coarse, fine)

    @cached_property
    def _is_coarse(self) -> fx.Node:
        twin = self.quantizer
        border = 0.0 if twin.two_sided else twin_threshold(twin.shift, twin.bits)
        threshold = self._constant(twin.scale * border, "threshold")
        return self._call(aten.gt.Tensor, self.x, threshold)

    @cached_property
    def _coarse(self) -> fx.Node:
        """Values rounded to the coarse grid, which are valid in the coarse region."""
        # Codes end at 255, which this zero point makes the code of the largest magnitude.
        zero = _BYTE_CODES - self.quantizer.levels
        return self._rounded(self.x, self.quantizer.coarse_scale, zero, "coarse")

    @cached_property
    def _fine(self) -> fx.Node:
        """Input ``x``, clipped at the end of the fine region where uint8 codes extend beyond it."""
        twin = self.quantizer
        if twin.two_sided:
            return self.x
        end = self._constant(twin.scale * (twin.levels - 1), "fine_end")
        return self._call(aten.minimum.default, self.x, end)

    def _rounded(self, x: fx.Node, scale: Tensor, zero: int, name: str) -> fx.Node:
        """Rounds ``x`` to a uint8 grid, in float."""
        parameters = (
            self._constant(scale, f"{name}_scale"),
            self._constant(torch.tensor(zero, dtype=torch.uint8), f"{name}_zero_point"),
        )
        codes = self._call(QUANTIZE, x, *parameters)
        return self._call(DEQUANTIZE, codes, *parameters, None)

    def _quantizer(self, name: str, module: UniformQuantizer, x: fx.Node) -> fx.Node:
        target = f"{self.node.target}_{name}"
        self.gm.add_submodule(target, module)
        call = self.gm.graph.call_module(target, (x,))
        call.meta = dict(self.node.meta)
        return call

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return emit(self.gm, target, *args, like=self.node)

    def _constant(self, value: Tensor, name: str) -> fx.Node:
        return add_constant(self.gm, value, f"{_edge_name(self.node)}_{name}", like=self.node)


def _edge_name(node: fx.Node) -> str:
    """Name of the edge that a quantizer call belongs to."""
    return str(node.target).rpartition(".")[2]


def unsigned(scale: Tensor, zero: int, *, bits: int) -> UniformQuantizer:
    """Makes a per-tensor uniform quantizer with unsigned codes."""
    point = torch.tensor(float(zero))
    return UniformQuantizer(scale, point, bits=bits, signed=False, axis=None)


def _multiplies_codes(gm: fx.GraphModule, edge: Edge) -> bool:
    """Whether the edge's product has an integer kernel, so that splitting it in two is worthwhile.

    An integer convolution needs a quantized output, which a sum of two convolutions is not.
    """
    other = submodule(gm, operand(edge.node, 1 - edge.index))
    patches = edge.kind is not OpKind.CONV or patch_size(edge.node) is not None
    return isinstance(other, Quantizer) and patches


def _largest_shift(quantizer: TwinUniformQuantizer) -> int | None:
    """Largest bound of the shift, at least 1, with which 8-bit codes represent all values."""
    room = (_BYTE_CODES - 1 - quantizer.grid_zero_point) // (quantizer.levels - 1)
    return room.bit_length() - 1 if room >= 2 else None
