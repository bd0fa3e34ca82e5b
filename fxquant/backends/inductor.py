"""Inductor backend: ``torch.compile`` of the integer form, for any batch size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed

from fxquant.backends.integer import lower_to_integer
from fxquant.errors import LoweringError


class CompiledInteger(nn.Module):
    """Module that inductor compiles on the first call, with a dynamic batch dimension.

    Args:
        module: the integer form that ``lower_to_integer`` returned.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._compiled = torch.compile(module.forward, fullgraph=True)

    def forward(self, images: Tensor) -> Any:
        """Outputs of the module for images ``(B, C, H, W)``.

        Raises:
            LoweringError: inductor failed to build its code.
        """
        # A batch of one may still get separate code: torch specializes on sizes 0 and 1.
        torch._dynamo.maybe_mark_dynamic(images, 0)
        try:
            return self._compiled(images)
        except BackendCompilerFailed as error:
            reason = str(error).strip().partition("\n")[0]
            raise LoweringError(
                f"inductor could not build the integer form: {reason}. Its full report is "
                "chained to this error; lower('integer') runs without a compiler"
            ) from error


def lower_to_inductor(gm: fx.GraphModule) -> nn.Module:
    """Lowers a graph to its integer form and wraps that in ``torch.compile``.

    Args:
        gm: the graph in stage FROZEN; not changed.

    Raises:
        LoweringError: the graph has no integer form, or inductor finds no C++ compiler.
    """
    return compile_integer(lower_to_integer(gm, integer_only=False))


def compile_integer(module: nn.Module) -> nn.Module:
    """Wraps an integer form in ``torch.compile``.

    Args:
        module: the integer form that ``lower_to_integer`` returned; shared, not copied.

    Returns:
        A module with the same inputs and outputs, which the first call compiles.

    Raises:
        LoweringError: inductor finds no C++ compiler.
    """
    _check_compiler()
    return CompiledInteger(module)


def _check_compiler() -> None:
    """Asks inductor for its compiler, so that the error about a missing compiler is one line."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise LoweringError(
            "the inductor backend needs a C++ compiler and found none. Install g++ (Debian: "
            "`apt install g++`) or clang, or name one in the environment variable CXX; "
            "lower('integer') runs without a compiler"
        ) from error
