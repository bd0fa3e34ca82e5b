"""Layout of a stream's channels in a value, derived by running operations on channel numbers.

The channels of a stream are numbered from 1. An operation that moves values, or averages them over
other axes, is run on a tensor that holds the number of each value's channel. The result shows where
the channels are, whatever the operation does; zeros are padding, which any rotation leaves alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.graph.dialect import DATA_MOVEMENT_OPS
from fxquant.graph.nodes import get_parameter, rank
from fxquant.graph.shapes import example_shape, example_size
from fxquant.graph.sizes import is_number


@dataclass(frozen=True)
class Layout:
    """Place of the channels in a value.

    Attributes:
        width: number of channels of the stream, at least 2.
        axis: the axis that the channels are on, from the front.
        copies: number of tokens whose channels follow each other on the axis, as behind the
            concatenation of a patch merging.
    """

    width: int
    axis: int
    copies: int = 1

    @property
    def size(self) -> int:
        """Length of the axis."""
        return self.width * self.copies

    def numbers(self, shape: Sequence[int]) -> Tensor:
        """The channel number of each element of a value.

        Args:
            shape: shape of the value.
        """
        pattern = torch.arange(1.0, self.width + 1, dtype=torch.float64).repeat(self.copies)
        return pattern.view([-1 if i == self.axis else 1 for i in range(len(shape))]).expand(shape)

    def in_result(self, node: fx.Node, result: fx.Node) -> Layout:
        """The layout in the result of an elementwise operation that broadcasts ``node``."""
        return replace(self, axis=self.axis + result.meta["val"].ndim - node.meta["val"].ndim)


def read_layout(numbers: Tensor, width: int) -> tuple[Layout, bool] | None:
    """The layout that a tensor of channel numbers shows, and whether zeros were padded.

    Args:
        numbers: channel numbers, zeros where an operation padded.
        width: number of channels of the stream.

    Returns:
        None where the channels are not in order along one axis.
    """
    numbers = numbers.round(decimals=6)  # interpolation rounds
    padding = numbers == 0
    for axis, size in enumerate(numbers.shape):
        if size == 0 or size % width:
            continue
        layout = Layout(width, axis, size // width)
        if bool(((numbers == layout.numbers(numbers.shape)) | padding).all()):
            return layout, bool(padding.any())
    return None


def run_on_numbers(node: fx.Node, layouts: Mapping[fx.Node, Layout]) -> Any:
    """The result of an operation on channel numbers.

    Args:
        node: an operation whose tensor operands all have a layout.
        layouts: layout of each tensor operand.
    """

    def value(source: fx.Node) -> Any:
        if is_number(source):
            return example_size(source.meta["val"])
        return layouts[source].numbers(example_shape(source))

    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def constant_root(node: fx.Node) -> fx.Node | None:
    """The constant that a value is moved from, None where it is computed in another way."""
    while node.op == "call_function" and node.target in DATA_MOVEMENT_OPS:
        node = node.all_input_nodes[0]
    return node if node.op == "get_attr" else None


def constant_value(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    """The value of a node with a ``constant_root``, for the example batch."""
    if node.op == "get_attr":
        return get_parameter(gm, node)

    def value(source: fx.Node) -> Any:
        return example_size(source.meta["val"]) if is_number(source) else constant_value(gm, source)

    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    moved: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return moved


def layout_in_constant(node: fx.Node, wanted: Layout) -> Layout | None:
    """The layout that a constant must have for a value moved from it to have another one.

    Args:
        node: a value with a ``constant_root``.
        wanted: the layout of the value.

    Returns:
        None where no layout of the constant leads there.
    """
    if node.op == "get_attr":
        shape = example_shape(node)
        fits = 0 <= wanted.axis < len(shape) and shape[wanted.axis] == wanted.size
        return wanted if fits else None
    source = node.all_input_nodes[0]
    shape = example_shape(source)
    for axis, size in enumerate(shape):
        if size == 0 or size % wanted.width:
            continue
        layout = Layout(wanted.width, axis, size // wanted.width)
        moved = run_on_numbers(node, {source: layout})
        shown = read_layout(moved, wanted.width) if isinstance(moved, Tensor) else None
        if shown is not None and shown[0] == wanted:
            return layout_in_constant(source, layout)
    return None


def has_layout(value: fx.Node, layout: Layout) -> bool:
    """Whether a value is a tensor with as many elements on a layout's axis as the layout has.

    Args:
        value: any node.
        layout: the layout.
    """
    if not isinstance(value.meta.get("val"), Tensor):
        return False
    shape = example_shape(value)
    return 0 <= layout.axis < len(shape) and shape[layout.axis] == layout.size


def is_same_for_channels(factor: fx.Node, layout: Layout, result: fx.Node) -> bool:
    """Whether an operand is the same for all channels of a result.

    Args:
        factor: an operand of an elementwise operation.
        layout: the layout of the result.
        result: the operation.
    """
    value: Any = factor.meta.get("val")
    if not isinstance(value, Tensor):
        return True
    axis = layout.axis + value.ndim - rank(result)
    return axis < 0 or int(example_shape(factor)[axis]) == 1
