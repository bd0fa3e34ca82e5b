"""A graph that is built anew, its modules and constants in one place."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

# Holds the modules and buffers, so that their names meet no attribute of a GraphModule.
_PARTS = "integer"


class NewGraph:
    """A graph under construction.

    Args:
        training: mode of its modules.
    """

    def __init__(self, *, training: bool) -> None:
        self.graph = fx.Graph()
        self._parts, self._training = nn.Module(), training

    def call(self, name: str, module: nn.Module, *args: fx.Node) -> fx.Node:
        """Adds a module, and a call of it.

        Args:
            name: wanted name of both; made unique.
            module: the module.
            *args: what it is called with.
        """
        unique = self._unique(name)
        self._parts.add_module(unique, module.train(self._training))
        return self.graph.create_node("call_module", f"{_PARTS}.{unique}", args, {}, name=unique)

    def buffer(self, name: str, value: Tensor) -> fx.Node:
        """Adds a constant, and a node that reads it."""
        unique = self._unique(name)
        self._parts.register_buffer(unique, value.detach().contiguous())
        return self.graph.create_node("get_attr", f"{_PARTS}.{unique}", (), {}, name=unique)

    def function(self, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """Adds a call of a function."""
        return self.graph.call_function(target, tuple(args), dict(kwargs))

    def finish(self, outputs: Any) -> fx.GraphModule:
        """The graph, with these outputs."""
        self.graph.output(outputs)
        root = nn.Module()
        root.add_module(_PARTS, self._parts)
        gm = fx.GraphModule(root, self.graph)
        gm.graph.eliminate_dead_code()
        gm.delete_all_unused_submodules()
        gm.graph.lint()
        gm.recompile()
        return gm

    def _unique(self, name: str) -> str:
        unique, i = name, 0
        while hasattr(self._parts, unique):
            i += 1
            unique = f"{name}_{i}"
        return unique
