"""A function with weights as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxquant.testing import DIM, seeded


class Fn(nn.Module):
    """A function of ``(x, weight)`` as a model."""

    def __init__(self, function: Any, *shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.empty(shape or (DIM, DIM)))

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.weight)


def model(function: Any, *shape: int) -> nn.Module:
    return seeded(Fn(function, *shape))
