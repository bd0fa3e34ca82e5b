"""Nodes that yield no tensor: sizes computed from the batch size, and other plain numbers."""

from __future__ import annotations

import torch
from torch import Tensor, fx


def is_size(node: fx.Node) -> bool:
    """Whether a node yields a whole number that depends on the batch size (``size_for``)."""
    return isinstance(node.meta.get("val"), torch.SymInt)


def is_number(node: fx.Node) -> bool:
    """Whether an operation yields a number and no tensor: a size, a fixed one, or a comparison."""
    val = node.meta.get("val")
    return node.op == "call_function" and not isinstance(val, Tensor | list | tuple)


def size_for(node: fx.Node, batch: int) -> int:
    """The number that a size yields for a batch of ``batch`` images."""
    expression = node.meta["val"].node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))
