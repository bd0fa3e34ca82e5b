"""Rewrites dynamic focusing quantizers as a clip and a uniform quantizer of 8 bits.

    focusing(x)     uniform(clip(x, b1, b2), scale)

Both ends of the interval are whole numbers of steps. The uniform quantizer therefore rounds clipped
values to these ends, and its codes are the codes of the interval plus the interval's start
(arXiv 2502.04628, eq. 15).
"""

from __future__ import annotations

from torch import fx

from fxquant.backends.onnx_qdq.twin import unsigned
from fxquant.graph.dialect import aten
from fxquant.graph.nodes import operand
from fxquant.graph.rewrite import emit
from fxquant.quantizers import DynamicFocusingQuantizer


def rewrite_focusing(
    gm: fx.GraphModule, node: fx.Node, quantizer: DynamicFocusingQuantizer
) -> None:
    """Rewrites one dynamic focusing quantizer in place.

    Args:
        gm: a copy of a FROZEN graph whose nodes carry shapes.
        node: call of the quantizer.
        quantizer: the quantizer.
    """
    with gm.graph.inserting_before(node):
        ends = quantizer.interval
        clipped = emit(gm, aten.clamp.default, operand(node, 0), *ends, like=node)
    node.update_arg(0, clipped)
    gm.set_submodule(str(node.target), unsigned(quantizer.scale, 0, bits=8))
