"""Sizes that a graph computes from the batch size."""

from __future__ import annotations

import torch
from torch import fx


def is_size(node: fx.Node) -> bool:
    """Whether a node yields a whole number computed from the batch size."""
    return isinstance(node.meta.get("val"), torch.SymInt)


def size_for(node: fx.Node, batch: int) -> int:
    """The number that such a node yields for a batch of that many images."""
    expression = node.meta["val"].node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))
