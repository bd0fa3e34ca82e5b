"""Watches a network run, and tells whether it is integer-only between its first and last code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "dot", "convolution"}


class _Operation(NamedTuple):
    """One operator that torch ran: its name, and the types of tensors that it read and wrote."""

    name: str
    reads: tuple[torch.dtype, ...]
    writes: tuple[torch.dtype, ...]

    @property
    def touches_float(self) -> bool:
        """Whether it read or wrote floating-point numbers."""
        return any(map(_is_float, (*self.reads, *self.writes)))

    @property
    def rounds(self) -> bool:
        """Whether it turned floats into integers."""
        return any(map(_is_float, self.reads)) and not any(map(_is_float, self.writes))


class _Recorder(TorchDispatchMode):
    """Keeps every operator that runs, whatever module or fused kernel it comes from."""

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
    """The operators that touched a float where none should.

    The stretch begins with the first operator that turns floats into integers, the last step of
    the quantization of the image, and ends with the last operator that computes on integers alone.
    In between, every operator that torch runs counts which reads or writes a floating-point
    tensor, moves and copies included. Behind it products count: functions of the outputs may be
    float, but a network may not leave the integers before its last product.

    Args:
        network: any module.
        images: ``(B, C, H, W)``.

    Returns:
        Their names in order; empty for an integer-only network.

    Raises:
        ValueError: the network never turns floats into integers, so there is nothing to watch.
    """
    with _Recorder() as recorder:
        network.forward(images)  # what is computed, without a hook that looks at the images
    ran = recorder.operations
    first = next((i for i, operation in enumerate(ran) if operation.rounds), None)
    if first is None:
        raise ValueError("the network computes no integers from its images; lower it first")
    last = max(i for i, item in enumerate(ran) if item.rounds or not item.touches_float)
    late = [item for item in ran[last + 1 :] if item.name.split(".")[1] in _PRODUCTS]
    return [item.name for item in (*ran[first + 1 : last], *late) if item.touches_float]
