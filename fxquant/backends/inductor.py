"""The inductor backend: ``torch.compile`` of the integer form, for any batch size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed

from fxquant.backends.integer import lower_to_integer
from fxquant.errors import LoweringError


class CompiledInteger(nn.Module):
    """A module compiled by inductor on its first call, batch dimension dynamic.

    Args:
        module: what ``lower_to_integer`` returned.
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
        # A batch of one may still get code of its own: torch specializes on sizes 0 and 1.
        torch._dynamo.maybe_mark_dynamic(images, 0)
        try:
            return self._compiled(images)
        except BackendCompilerFailed as error:
            reason = str(error).strip().partition("\n")[0]
            raise LoweringError(
                f"inductor could not build the integer form: {reason}. Its whole report is "
                "chained to this error; lower('integer') runs without a compiler"
            ) from error


def lower_to_inductor(gm: fx.GraphModule) -> nn.Module:
    """``torch.compile`` of the integer form of a graph.

    Args:
        gm: in stage FROZEN; not changed.

    Raises:
        LoweringError: the graph has no integer form, or inductor finds no C++ compiler.
    """
    return compile_integer(lower_to_integer(gm, integer_only=False))


def compile_integer(module: nn.Module) -> nn.Module:
    """``torch.compile`` of an integer form.

    Args:
        module: what ``lower_to_integer`` returned; shared, not copied.

    Returns:
        A module with the same inputs and outputs. Its first call compiles.

    Raises:
        LoweringError: inductor finds no C++ compiler.
    """
    _check_compiler()
    return CompiledInteger(module)


def _check_compiler() -> None:
    """Asks inductor for its compiler, so that a missing one is said in one line."""
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
