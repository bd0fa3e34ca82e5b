"""Forms of the float graph's values in the integer-only graph: sums, functions of codes, codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from fxquant.backends.integer.lowerings import integer_form
from fxquant.backends.integer.modules import AnyOperand, IntMatmul, QuantizedOperand, storage_dtype
from fxquant.backends.integer.products import Product
from fxquant.errors import LoweringError
from fxquant.graph.dialect import aten
from fxquant.graph.nodes import constant, evaluate_moves, operand
from fxquant.graph.shapes import example_shape
from fxquant.quantizers import AffineQuantizer, Quantizer
from fxquant.quantizers.ops import broadcast


class Accumulator(NamedTuple):
    """Integer accumulators with a constant unit.

    Attributes:
        node: node of the lowered graph that yields the accumulators.
        scale: unit of the accumulators, float64, ``()`` or ``(C,)``.
        axis: axis that the unit runs along, counted from the last; None per tensor.
        bound: largest possible magnitude of an accumulator.
    """

    node: fx.Node
    scale: Tensor
    axis: int | None
    bound: int


class CodeFunction(NamedTuple):
    """Function of codes, which becomes a table of its reader's codes or of whole numbers.

    Attributes:
        node: node of the lowered graph that yields the codes.
        quantizer: quantizer of the codes.
        function: function of the codes' values.
    """

    node: fx.Node
    quantizer: AffineQuantizer
    function: Callable[[Tensor], Tensor]


class Factor(NamedTuple):
    """Constant factor that a node multiplies a value by.

    Attributes:
        source: node that yields the value.
        values: the factor, float64, ``()`` or ``(C,)``.
        axis: axis that the factor runs along, counted from the last; None for one number.
    """

    source: fx.Node
    values: Tensor
    axis: int | None


@dataclass(frozen=True, kw_only=True)
class CodeRequest:
    """Request for a quantizer's codes of a value, or of a multiple of the value.

    Attributes:
        key: key that is equal for equal codes.
        quantizer: quantizer of the codes.
        scale: scale of the codes over the factor of the value, float64, ``()`` or ``(C,)``;
            infinite where the value is multiplied by zero.
        zero_point: zero point of the codes, shaped as scale or ``()``.
        axis: axis of the value that scale or zero_point runs along, counted from the last; None
            per tensor.
    """

    key: tuple[object, ...]
    quantizer: Quantizer = field(compare=False)
    scale: Tensor = field(compare=False)
    zero_point: Tensor = field(compare=False)
    axis: int | None = field(compare=False)

    @classmethod
    def of(cls, quantizer: Quantizer) -> CodeRequest:
        """Requests the codes that a quantizer yields."""
        buffers = (tuple(buffer.flatten().tolist()) for buffer in quantizer.buffers())
        return cls(
            key=(json.dumps(quantizer.config()), *buffers),
            quantizer=quantizer,
            scale=quantizer.scale.double(),
            zero_point=quantizer.zero_codes,
            axis=quantizer.scale_axis,
        )

    def times(self, factor: Factor) -> CodeRequest:
        """Requests the codes of the value before its multiplication by ``factor``."""
        assert self.axis is None
        key = (*self.key, "times", tuple(factor.values.flatten().tolist()), factor.axis)
        return replace(self, key=key, scale=self.scale / factor.values, axis=factor.axis)

    def by_channel(self, heads: Tensor, axis: int) -> CodeRequest:
        """Requests the same codes of a value whose channels are not yet divided into heads.

        Args:
            heads: entry of ``self.axis`` that each channel is moved to, ``(C,)``.
            axis: axis of the channels.
        """
        key = (*self.key, "by channel", axis, tuple(heads.tolist()))
        zero_point = self.zero_point[heads] if self.zero_point.ndim else self.zero_point
        return replace(self, key=key, scale=self.scale[heads], zero_point=zero_point, axis=axis)

    @property
    def dtype(self) -> torch.dtype:
        """Storage type of the codes."""
        return storage_dtype(self.quantizer)

    def zero_code(self) -> int:
        """The code that represents zero.

        Raises:
            LoweringError: several codes represent zero, or none does.
        """
        codes = set(self.zero_point.flatten().tolist())
        if len(codes) > 1:
            raise LoweringError("padding needs one zero point, and the padded codes have several")
        code = int(codes.pop())
        if code < self.quantizer.code_range[0]:
            raise LoweringError(
                "padding needs a code for zero, and the quantizer's interval begins above zero"
            )
        return code

    def constant(self, value: Tensor) -> Tensor:
        """Codes of a constant."""
        return self._multiplied(value.double())

    def table(self, values: Tensor) -> Tensor:
        """Codes of a function's values.

        Raises:
            LoweringError: the codes of one value differ between channels.
        """
        if self.axis is not None:
            raise LoweringError("an activation function is read with a scale for each channel")
        return self._multiplied(values.double())

    def _multiplied(self, value: Tensor) -> Tensor:
        # The requested scale has been divided by the factor of the value.
        factor = broadcast(self.quantizer.scale / self.scale, value.ndim, self.axis)
        return self.quantizer.quantize((value * factor).float()).to(self.dtype)

    def fits(self, sums: Accumulator) -> bool:
        """Whether the units of sums and codes run along one axis, so that sums become codes."""
        return self.axis is None or sums.axis in (None, self.axis)

    def requantizer(self, sums: Accumulator) -> nn.Module:
        """Makes the module that requantizes fitting sums to the codes.

        Raises:
            LoweringError: the table of lowerings has no requantization to the codes.
        """
        make = integer_form(self.quantizer).requantize
        if make is None:
            raise LoweringError(
                f"{sums.node.name} yields integers, and the integer backend has no requantization "
                f"of them to codes of {type(self.quantizer).__name__}",
                edge=sums.node.name,
                got=type(self.quantizer).__name__,
            )
        axis = self.axis if sums.axis is None else sums.axis
        ratio = sums.scale / self.scale
        return make(
            self.quantizer, ratio, self.zero_point, axis=axis, bound=sums.bound, dtype=self.dtype
        )


def scaling(gm: fx.GraphModule, node: fx.Node) -> Factor | None:
    """Constant factor that ``node`` multiplies a value by; None for any other node.

    The factor is a number, or a constant with more than one entry along at most one axis.
    """
    if node.target not in (aten.mul.Tensor, aten.div.Tensor):
        return None
    source, multiplier = node.args
    if node.target is aten.mul.Tensor and constant(gm, source) is not None:
        source, multiplier = multiplier, source
    values = constant(gm, multiplier)
    if isinstance(multiplier, int | float):
        values = torch.tensor(float(multiplier))
    if values is None or not isinstance(source, fx.Node):
        return None
    values = values.double() if node.target is aten.mul.Tensor else 1 / values.double()
    axes = [axis for axis in range(-values.ndim, 0) if values.shape[axis] != 1]
    if not axes:
        return Factor(source, values.reshape(()), None)
    return Factor(source, values.flatten(), axes[0]) if len(axes) == 1 else None


def sums_of_product(
    call: fx.Node, product: Product, weight: Tensor | None, node: fx.Node
) -> Accumulator:
    """Sums of a product of codes, with their unit and bound.

    Args:
        call: node of the lowered graph that yields the accumulators.
        product: module of the product.
        weight: the right operand where it is constant.
        node: the product in the float graph.

    Raises:
        LoweringError: the length of the sum is not known, or the scales of both operands run along
            axes, which differ.
    """
    if isinstance(product, IntMatmul):
        left, right = product.lhs, product.rhs
        depth = operand(node, 0).meta["val"].shape[-1]
        operand_axes = {_axis(left), _axis(right)}
    else:
        assert weight is not None
        left, right = product.input, product.weight
        depth = weight.shape[1:].numel()
        # Output channels lie last behind a linear, before the spatial axes behind a convolution.
        operand_axes = {_axis(left), None if right.axis is None else 1 - weight.ndim}
    axes = [axis for axis in operand_axes if axis is not None]
    if not isinstance(depth, int) or len(axes) > 1:
        raise LoweringError(
            f"{node.name} sums over an axis whose size changes with the batch, or its operands "
            "have scales along different axes",
            edge=node.name,
        )
    axis = axes[0] if axes else None
    bound = depth * left.bound * right.bound
    codes = getattr(product, "bias_codes", None)
    if codes is not None:
        bound += int(codes.abs().max())
    return Accumulator(call, (left.scale * right.scale).double(), axis, bound)


def _axis(term: AnyOperand) -> int | None:
    """Axis that the scale of a product's operand runs along; None per tensor."""
    return term.axis if isinstance(term, QuantizedOperand) else None


def heads_of_channels(source: fx.Node, node: fx.Node, axis: int, request: CodeRequest) -> Tensor:
    """Maps each channel to the entry of an axis that data movement moves it to.

    Args:
        source: node that yields the channels.
        node: node reached from ``source`` through data movement.
        axis: axis of the channels, counted from the last.
        request: codes with a scale for each entry of an axis of ``node``'s output.

    Returns:
        Entry of each channel, ``(C,)``, whole numbers.

    Raises:
        LoweringError: data movement spreads a channel over several entries.
    """
    shape = example_shape(source)
    numbers = torch.arange(shape[axis]).view(-1, *[1] * (-axis - 1)).expand(shape)
    moved = evaluate_moves(node, source, numbers, {}).movedim(request.axis or 0, 0).flatten(1)
    heads = torch.full((shape[axis],), -1)
    for head, channels in enumerate(moved):
        head_channels = channels.unique()
        if bool((heads[head_channels] >= 0).any()):
            raise LoweringError(
                f"{source.name} has a scale for each channel, and what reads {node.name} has one "
                "for each entry of an axis that mixes them",
                edge=source.name,
            )
        heads[head_channels] = head
    return heads.clamp(min=0)
