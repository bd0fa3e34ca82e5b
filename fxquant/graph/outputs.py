"""The output tensors of a model, taken out of the containers that hold them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def is_logits(output: Tensor) -> bool:
    """Whether an output has the shape of logits: ``(B, C)`` with two classes or more."""
    return output.ndim == 2 and output.shape[1] > 1


def float_outputs(outputs: Any) -> list[Tensor]:
    """The float tensors among a model's outputs."""
    leaves = pytree.tree_leaves(outputs)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
