"""Keys of attention whose channels can be shifted without changing the function.

Softmax does not change where a number is added to a whole row of scores. A vector ``c`` that is
subtracted from every key subtracts ``q c`` from all scores of the query ``q``: a number for each
row. Nothing has to be added elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from fxquant.config.vocabulary import OpKind
from fxquant.graph.dialect import aten, op_kind
from fxquant.graph.nodes import evaluate_moves, moved_readers, operation_name
from fxquant.graph.shapes import example_shape
from fxquant.graph.softmax import SOFTMAX_OPS, is_along_rows
from fxquant.rotation.heads import reads_softmax, score_site
from fxquant.utils.notes import Refusal

# Scores are masked with minus infinity or with a number that is as good as that. A number of the
# size of scores would be part of the function.
_MASKED_BELOW = -1e4


def key_sites(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node | Refusal]]:
    """Each product of scores, with the linear of its keys or the reason why keys cannot be shifted.

    Args:
        gm: in the canonical dialect.
    """
    for product in list(gm.graph.nodes):
        if op_kind(product) is OpKind.MATMUL and not reads_softmax(product):
            site = _row_refusal(product) or score_site(gm, product)
            yield product, site if isinstance(site, Refusal) else site.rows[1][0]


def _row_refusal(product: fx.Node) -> Refusal | None:
    """The reason why a number added to a row of scores changes the function, or None."""
    starts = [product]
    for start in starts:
        for reader, node in moved_readers(start):
            if not _rows_stay(node, start):
                return Refusal(f"rows of {product} do not reach {reader} whole")
            if reader.target in SOFTMAX_OPS:
                if not is_along_rows(reader):
                    return Refusal(f"{reader} is not along the rows")
            elif _keeps_rows(reader, node):
                starts.append(reader)
            else:
                return Refusal(f"{reader} ({operation_name(reader)}) reads scores")
    return None


def _rows_stay(node: fx.Node, start: fx.Node) -> bool:
    """Whether data movement keeps rows: a number for each row at ``start`` is one at ``node``."""
    shape = example_shape(start)
    rows = torch.arange(math.prod(shape[:-1])).view(*shape[:-1], 1).expand(shape)
    moved: Tensor = evaluate_moves(node, start, rows, {})
    return bool((moved == moved[..., :1]).all())


def _keeps_rows(reader: fx.Node, scores: fx.Node) -> bool:
    """Whether an operation on scores gives, for a number added to a row, a number added to it."""
    if reader.target is aten.add.Tensor:
        return True
    if reader.target is aten.masked_fill.Scalar:
        value = float(reader.args[2])  # type: ignore[arg-type]
        return reader.args[0] is scores and value <= _MASKED_BELOW
    if reader.target not in (aten.mul.Tensor, aten.div.Tensor):
        return False
    first, second = reader.args
    if reader.target is aten.div.Tensor and first is not scores:
        return False
    factor = second if first is scores else first
    if not isinstance(factor, fx.Node):
        return True
    shape = example_shape(factor)
    return factor is not scores and (not shape or shape[-1] == 1)
