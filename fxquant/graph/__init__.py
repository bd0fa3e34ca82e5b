"""The canonical dialect of a captured graph: its questions, edits, checks and files."""

from fxquant.graph.dialect import (
    DATA_MOVEMENT_OPS,
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
    evaluate_moves,
    get_parameter,
    module_path,
    operand,
    rank,
    skip_data_movement,
    source_line,
    stage,
    submodule,
)
from fxquant.graph.products import Product, weighted_products

__all__ = [
    "DATA_MOVEMENT_OPS",
    "PRODUCER_NAMES",
    "UNSUPPORTED",
    "Edge",
    "Product",
    "arguments",
    "aten",
    "constant",
    "data_users",
    "edges",
    "elementwise_kind",
    "evaluate_moves",
    "fed_by",
    "get_parameter",
    "module_path",
    "op_kind",
    "operand",
    "possible_edges",
    "quantized_edges",
    "rank",
    "skip_data_movement",
    "source_line",
    "stage",
    "submodule",
    "weighted_products",
]
