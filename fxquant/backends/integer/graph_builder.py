"""Builder of a new graph whose modules and constants lie in one submodule."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

# Submodule of the modules and buffers, whose names then cannot clash with attributes of a
# GraphModule.
_SUBMODULE = "integer"


class GraphBuilder:
    """Graph under construction.

    Args:
        training: whether the modules are in training mode.
    """

    def __init__(self, *, training: bool) -> None:
        self.graph = fx.Graph()
        self._submodule, self._training = nn.Module(), training

    def call(self, name: str, module: nn.Module, *args: fx.Node) -> fx.Node:
        """Adds a module and a call of the module.

        Args:
            name: name of the module and of the call, to which a number is added where it is taken.
            module: the module.
            *args: arguments of the call.
        """
        unique = self._unique(name)
        self._submodule.add_module(unique, module.train(self._training))
        return self.graph.create_node(
            "call_module", f"{_SUBMODULE}.{unique}", args, {}, name=unique
        )

    def buffer(self, name: str, value: Tensor) -> fx.Node:
        """Adds a constant as a buffer, and a node that reads the buffer."""
        unique = self._unique(name)
        self._submodule.register_buffer(unique, value.detach().contiguous())
        return self.graph.create_node("get_attr", f"{_SUBMODULE}.{unique}", (), {}, name=unique)

    def function(self, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """Adds a call of a function."""
        return self.graph.call_function(target, tuple(args), dict(kwargs))

    def finish(self, outputs: Any) -> fx.GraphModule:
        """Adds the outputs and returns the graph module."""
        self.graph.output(outputs)
        root = nn.Module()
        root.add_module(_SUBMODULE, self._submodule)
        gm = fx.GraphModule(root, self.graph)
        gm.graph.eliminate_dead_code()
        gm.delete_all_unused_submodules()
        gm.graph.lint()
        gm.recompile()
        return gm

    def _unique(self, name: str) -> str:
        unique, i = name, 0
        while hasattr(self._submodule, unique):
            i += 1
            unique = f"{name}_{i}"
        return unique
