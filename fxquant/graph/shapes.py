"""Shapes of a graph's values for the example batch that it was captured with."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def image_node(graph: fx.Graph) -> fx.Node:
    """The placeholder; a captured graph has one."""
    image: fx.Node = next(node for node in graph.nodes if node.op == "placeholder")
    return image


def example_size(value: Any) -> Any:
    """The example value of a symbolic integer; any other value unchanged."""
    return value.node.hint if isinstance(value, torch.SymInt) else value


def example_shape(node: fx.Node) -> list[int]:
    """Shape of the tensor that a node yields for the example batch."""
    return [int(example_size(size)) for size in node.meta["val"].shape]


def example_batch(graph: fx.Graph) -> int:
    """Number of images of the example batch."""
    return example_shape(image_node(graph))[0]
