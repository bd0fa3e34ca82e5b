"""Enums that graphs and policies share: stages, operations, their inputs, ends of a network."""

from __future__ import annotations

from enum import IntEnum, StrEnum


class Stage(IntEnum):
    """Stage of a graph in the pipeline; ``gm.meta["stage"]``."""

    FLOAT = 0
    ANNOTATED = 1
    OBSERVED = 2
    FROZEN = 3


class OpKind(StrEnum):
    """Operations whose inputs can be quantized."""

    LINEAR = "linear"
    CONV = "conv"
    MATMUL = "matmul"
    LAYER_NORM = "layer_norm"
    RMS_NORM = "rms_norm"
    SOFTMAX = "softmax"
    ACTIVATION = "activation"
    ADD = "add"

    @property
    def is_product(self) -> bool:
        """Whether the operation multiplies two tensors; others work by value or by row."""
        return self in _PRODUCTS


_PRODUCTS = (OpKind.LINEAR, OpKind.CONV, OpKind.MATMUL)


class Arg(StrEnum):
    """The role of a quantized input of an operation."""

    INPUT = "input"
    WEIGHT = "weight"
    LHS = "lhs"
    RHS = "rhs"


class End(StrEnum):
    """Ends of a network: products with no product before them, and products with none after."""

    FIRST = "first"
    LAST = "last"
