"""Table of lowerings, which rewrite each kind of quantizer as the uniform quantizers of QDQ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxquant.backends.base import lowering_of
from fxquant.backends.onnx_qdq.focusing import rewrite_focusing
from fxquant.backends.onnx_qdq.twin import TwinForm, rewrite_twin
from fxquant.graph.edges import quantized_edges
from fxquant.graph.nodes import submodule
from fxquant.quantizers import (
    DynamicFocusingQuantizer,
    Quantizer,
    TwinUniformQuantizer,
    UniformQuantizer,
)

_BACKEND_IN_ERRORS = "ONNX, whose QuantizeLinear is uniform,"


def _keep_uniform(gm: fx.GraphModule, node: fx.Node, quantizer: UniformQuantizer) -> None:
    """Leaves a uniform quantizer to :class:`fxquant.backends.onnx_qdq.legalize.Legalizer`."""


# Functions that rewrite the call of a quantizer in place and return its form for the report.
LOWERINGS: dict[type[Quantizer], Callable[[fx.GraphModule, fx.Node, Any], TwinForm | None]] = {
    UniformQuantizer: _keep_uniform,
    TwinUniformQuantizer: rewrite_twin,
    DynamicFocusingQuantizer: rewrite_focusing,
}


@torch.no_grad()
def rewrite_quantizers(gm: fx.GraphModule) -> tuple[TwinForm, ...]:
    """Rewrites every quantizer as uniform quantizers, in place.

    Args:
        gm: a copy of a FROZEN graph whose nodes carry shapes.

    Returns:
        The forms of twin quantizers, in graph order.

    Raises:
        LoweringError: ONNX has no form of a quantizer.
    """
    edges = {edge.source: edge for edge in reversed(list(quantized_edges(gm)))}
    forms = []
    for node in list(gm.graph.nodes):
        quantizer = submodule(gm, node)
        if isinstance(quantizer, Quantizer):
            rewrite = lowering_of(LOWERINGS, quantizer, edges[node], _BACKEND_IN_ERRORS)
            form = rewrite(gm, node, quantizer)
            if form is not None:
                forms.append(form)
    return tuple(forms)
