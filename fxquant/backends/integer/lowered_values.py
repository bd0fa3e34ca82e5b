"""What stands for a value of the float graph in the integer-only one."""

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
    """Integer accumulators.

    Attributes:
        node: yields them, in the new graph.
        scale: their unit, float64, ``()`` or ``(C,)``.
        axis: axis that it runs along, counted from the last; None per tensor.
        bound: none is larger in magnitude.
    """

    node: fx.Node
    scale: Tensor
    axis: int | None
    bound: int


class CodeFunction(NamedTuple):
    """A function of codes: a table, once it is known what reads it.

    Attributes:
        node: yields the codes, in the new graph.
        quantizer: of the codes.
        function: of their values.
    """

    node: fx.Node
    quantizer: AffineQuantizer
    function: Callable[[Tensor], Tensor]


class Factor(NamedTuple):
    """What a node multiplies a value by.

    Attributes:
        source: yields the value.
        values: float64, ``()`` or ``(C,)``.
        axis: axis that they run along, counted from the last; None for one.
    """

    source: fx.Node
    values: Tensor
    axis: int | None


@dataclass(frozen=True, kw_only=True)
class CodeRequest:
    """Codes of a value, or of a multiple of it, in the terms of some quantizer.

    Attributes:
        key: equal for equal codes.
        quantizer: what the codes mean.
        scale: of the codes over the factor of the value, float64, ``()`` or ``(C,)``; infinite
            where the value is multiplied by zero.
        zero_point: of the codes, as scale or ``()``.
        axis: axis of the value that either runs along, counted from the last; None per tensor.
    """

    key: tuple[object, ...]
    quantizer: Quantizer = field(compare=False)
    scale: Tensor = field(compare=False)
    zero_point: Tensor = field(compare=False)
    axis: int | None = field(compare=False)

    @classmethod
    def of(cls, quantizer: Quantizer) -> CodeRequest:
        """The codes that a quantizer gives."""
        buffers = (tuple(buffer.flatten().tolist()) for buffer in quantizer.buffers())
        return cls(
            key=(json.dumps(quantizer.config()), *buffers),
            quantizer=quantizer,
            scale=quantizer.scale.double(),
            zero_point=quantizer.zero_codes,
            axis=quantizer.scale_axis,
        )

    def times(self, factor: Factor) -> CodeRequest:
        """The codes of the value before it is multiplied; these are per tensor."""
        assert self.axis is None
        key = (*self.key, "times", tuple(factor.values.flatten().tolist()), factor.axis)
        return replace(self, key=key, scale=self.scale / factor.values, axis=factor.axis)

    def by_channel(self, heads: Tensor, axis: int) -> CodeRequest:
        """The same codes where channels have not yet been sorted into heads.

        Args:
            heads: entry of ``self.axis`` that each channel goes to, ``(C,)``.
            axis: axis of the channels.
        """
        key = (*self.key, "by channel", axis, tuple(heads.tolist()))
        zero_point = self.zero_point[heads] if self.zero_point.ndim else self.zero_point
        return replace(self, key=key, scale=self.scale[heads], zero_point=zero_point, axis=axis)

    @property
    def dtype(self) -> torch.dtype:
        """Type that the codes are stored in."""
        return storage_dtype(self.quantizer)

    def zero_code(self) -> int:
        """The one code that stands for zero.

        Raises:
            LoweringError: there are several, or none.
        """
        codes = set(self.zero_point.flatten().tolist())
        if len(codes) > 1:
            raise LoweringError("padding needs one zero point, the codes there have several")
        code = int(codes.pop())
        if code < self.quantizer.code_range[0]:
            raise LoweringError("padding needs a code for zero, and the interval begins above it")
        return code

    def constant(self, value: Tensor) -> Tensor:
        """Codes of a constant."""
        return self._multiplied(value.double())

    def table(self, values: Tensor) -> Tensor:
        """Codes of the values of a function.

        Raises:
            LoweringError: codes of one value differ by channel.
        """
        if self.axis is not None:
            raise LoweringError("a function is read with a scale for each channel")
        return self._multiplied(values.double())

    def _multiplied(self, value: Tensor) -> Tensor:
        # The scale divides out what the value is to be multiplied by.
        factor = broadcast(self.quantizer.scale / self.scale, value.ndim, self.axis)
        return self.quantizer.quantize((value * factor).float()).to(self.dtype)

    def fits(self, sums: Accumulator) -> bool:
        """Whether scales of sums and codes run along one axis, so that either gives the other."""
        return self.axis is None or sums.axis in (None, self.axis)

    def requantizer(self, sums: Accumulator) -> nn.Module:
        """The module from sums that fit to these codes."""
        axis = self.axis if sums.axis is None else sums.axis
        ratio = sums.scale / self.scale
        return integer_form(self.quantizer).requantize(
            self.quantizer, ratio, self.zero_point, axis=axis, bound=sums.bound, dtype=self.dtype
        )


def scaling(gm: fx.GraphModule, node: fx.Node) -> Factor | None:
    """What ``node`` multiplies a value by, None if it does something else.

    A number, or a constant that is no tensor along all axes but one.
    """
    if node.target not in (aten.mul.Tensor, aten.div.Tensor):
        return None
    source, given = node.args
    if node.target is aten.mul.Tensor and constant(gm, source) is not None:
        source, given = given, source
    values = constant(gm, given)
    if isinstance(given, int | float):
        values = torch.tensor(float(given))
    if values is None or not isinstance(source, fx.Node):
        return None
    values = values.double() if node.target is aten.mul.Tensor else 1 / values.double()
    long = [axis for axis in range(-values.ndim, 0) if values.shape[axis] != 1]
    if not long:
        return Factor(source, values.reshape(()), None)
    return Factor(source, values.flatten(), long[0]) if len(long) == 1 else None


def sums_of_product(
    call: fx.Node, product: Product, weight: Tensor | None, node: fx.Node
) -> Accumulator:
    """What a product of codes gives.

    Args:
        call: yields its accumulators.
        product: its module.
        weight: the right operand where it is constant.
        node: the product in the old graph.

    Raises:
        LoweringError: the length of the sum is not known, or both operands have several scales.
    """
    if isinstance(product, IntMatmul):
        left, right = product.lhs, product.rhs
        depth = operand(node, 0).meta["val"].shape[-1]
        along = {_axis(left), _axis(right)}
    else:
        assert weight is not None
        left, right = product.input, product.weight
        depth = weight.shape[1:].numel()
        # Output channels lie last behind a linear, before the spatial axes behind a convolution.
        along = {_axis(left), None if right.axis is None else 1 - weight.ndim}
    axes = [axis for axis in along if axis is not None]
    if not isinstance(depth, int) or len(axes) > 1:
        raise LoweringError(
            f"{node.name} sums over an axis whose size changes with the batch, or its operands "
            "have scales along different axes"
        )
    axis = axes[0] if axes else None
    bound = depth * left.bound * right.bound
    codes = getattr(product, "bias_codes", None)
    if codes is not None:
        bound += int(codes.abs().max())
    return Accumulator(call, (left.scale * right.scale).double(), axis, bound)


def _axis(side: AnyOperand) -> int | None:
    return side.axis if isinstance(side, QuantizedOperand) else None


def heads_of_channels(source: fx.Node, node: fx.Node, axis: int, wanted: CodeRequest) -> Tensor:
    """Which entry of an axis each channel goes to, when values are moved.

    Args:
        source: yields the channels.
        node: reached from there through moves.
        axis: axis of the channels, counted from the last.
        wanted: codes with a scale for each entry of an axis of what ``node`` yields.

    Returns:
        ``(C,)``, whole numbers.

    Raises:
        LoweringError: some channel goes to several entries.
    """
    shape = example_shape(source)
    numbers = torch.arange(shape[axis]).view(-1, *[1] * (-axis - 1)).expand(shape)
    moved = evaluate_moves(node, source, numbers, {}).movedim(wanted.axis or 0, 0).flatten(1)
    heads = torch.full((shape[axis],), -1)
    for head, channels in enumerate(moved):
        taken = channels.unique()
        if bool((heads[taken] >= 0).any()):
            raise LoweringError(
                f"{source.name} has a scale for each channel, and what reads {node.name} has one "
                "for each entry of an axis that mixes them"
            )
        heads[taken] = head
    return heads.clamp(min=0)
