"""The canonical dialect of a captured graph: its questions, edits, checks and files."""

from fxquant.graph.dialect import (
    MOVES,
    PRODUCER_NAMES,
    UNSUPPORTED,
    aten,
    elementwise_kind,
    op_kind,
)
from fxquant.graph.edges import Edge, edges, fed_by, possible_edges, quantized_edges
from fxquant.graph.nodes import (
    arguments,
    constant,
    data_users,
    get_parameter,
    module_path,
    operand,
    rank,
    replay,
    source_line,
    stage,
    submodule,
    through_moves,
)

__all__ = [
    "MOVES",
    "PRODUCER_NAMES",
    "UNSUPPORTED",
    "Edge",
    "arguments",
    "aten",
    "constant",
    "data_users",
    "edges",
    "elementwise_kind",
    "fed_by",
    "get_parameter",
    "module_path",
    "op_kind",
    "operand",
    "possible_edges",
    "quantized_edges",
    "rank",
    "replay",
    "source_line",
    "stage",
    "submodule",
    "through_moves",
]
