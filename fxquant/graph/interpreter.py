"""The interpreter that fxquant runs graphs with."""

from __future__ import annotations

from torch import fx


class GraphInterpreter(fx.Interpreter):
    """Runs a graph node by node; errors keep their message, to which torch would add a trace.

    Args:
        gm: the graph.
        keep_values: whether values stay in ``env`` behind their last reader, for subclasses that
            drop values on their own.
    """

    def __init__(self, gm: fx.GraphModule, *, keep_values: bool = False) -> None:
        super().__init__(gm, garbage_collect_values=not keep_values)
        self.extra_traceback = False
