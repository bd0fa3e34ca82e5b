"""Records the operators of a network's run and lists those that touch floats between codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# Names of torch's operators that compute products.
_PRODUCT_OPERATORS = {"mm", "bmm", "addmm", "baddbmm", "mv", "dot", "convolution"}


class _Operation(NamedTuple):
    """Record of an operator that torch ran: name, and types of the tensors read and written."""

    name: str
    reads: tuple[torch.dtype, ...]
    writes: tuple[torch.dtype, ...]

    @property
    def touches_float(self) -> bool:
        """Whether the operator read or wrote floating-point numbers."""
        return any(map(_is_float, (*self.reads, *self.writes)))

    @property
    def rounds(self) -> bool:
        """Whether the operator turned floats into integers."""
        return any(map(_is_float, self.reads)) and not any(map(_is_float, self.writes))


class _Recorder(TorchDispatchMode):
    """Records every operator that runs, from any module or fused kernel."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[_Operation] = []

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ):
        result = func(*args, **(kwargs or {}))
        self.operations.append(_Operation(str(func), _types((args, kwargs)), _types(result)))
        return result


def _types(values: Any) -> tuple[torch.dtype, ...]:
    leaves = pytree.tree_leaves(values)
    return tuple(leaf.dtype for leaf in leaves if isinstance(leaf, Tensor))


def _is_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


@torch.no_grad()
def float_operations(network: nn.Module, images: Tensor) -> list[str]:
    """Lists the operators that touched a float in the integer stretch of a network's run.

    The stretch begins with the first operator that turns floats into integers, the last step of
    the quantization of the image, and ends with the last operator that computes on integers alone.
    Within the stretch the list has every operator that reads or writes a floating-point tensor,
    data movement and copies included. Behind the stretch it has the float products: functions of
    the outputs may be float, but a network may not leave the integers before its last product.

    Args:
        network: any module.
        images: ``(B, C, H, W)``.

    Returns:
        Names of the operators in order; empty for an integer-only network.

    Raises:
        ValueError: the network never turns floats into integers, so that it has no such stretch.
    """
    with _Recorder() as recorder:
        network.forward(images)  # the computation, without hooks that read the images
    operations = recorder.operations
    first = next((i for i, operation in enumerate(operations) if operation.rounds), None)
    if first is None:
        raise ValueError("the network computes no integers from its images; lower it first")
    last = max(i for i, item in enumerate(operations) if item.rounds or not item.touches_float)
    late_products = [
        item for item in operations[last + 1 :] if item.name.split(".")[1] in _PRODUCT_OPERATORS
    ]
    return [
        item.name for item in (*operations[first + 1 : last], *late_products) if item.touches_float
    ]
