"""Words of a graph and its policies: stages, operations, their inputs, ends of a network."""

from __future__ import annotations

from enum import IntEnum, StrEnum


class Stage(IntEnum):
    """What a graph has been through; ``gm.meta["stage"]``."""

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
        """Whether it multiplies two tensors; the others work value by value or row by row."""
        return self in _PRODUCTS


_PRODUCTS = (OpKind.LINEAR, OpKind.CONV, OpKind.MATMUL)


class Arg(StrEnum):
    """The role of a quantized input of an operation."""

    INPUT = "input"
    WEIGHT = "weight"
    LHS = "lhs"
    RHS = "rhs"


class End(StrEnum):
    """The ends of a network: products with none before them, and products with none after."""

    FIRST = "first"
    LAST = "last"
