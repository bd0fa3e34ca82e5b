"""Shapes that a graph carries from its example batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def image_node(graph: fx.Graph) -> fx.Node:
    """The placeholder, of which a captured graph has one."""
    found: fx.Node = next(node for node in graph.nodes if node.op == "placeholder")
    return found


def example_size(value: Any) -> Any:
    """The example value of a symbolic integer; any other value as it is."""
    return value.node.hint if isinstance(value, torch.SymInt) else value


def example_shape(node: fx.Node) -> list[int]:
    """The shape of what a node yields for the example batch."""
    return [int(example_size(size)) for size in node.meta["val"].shape]


def example_batch(graph: fx.Graph) -> int:
    """Number of images of the example batch."""
    return example_shape(image_node(graph))[0]
