"""Sizes of the parameters of a graph, in bytes, before and after quantization."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from fxquant.graph.nodes import get_parameter, submodule
from fxquant.quantizers import Quantizer


def float_bytes(gm: fx.GraphModule) -> int:
    """Bytes of the parameters that a graph in stage FLOAT reads, shared ones once."""
    return sum(4 * value.numel() for value in _parameters(gm).values())


def quantized_bytes(gm: fx.GraphModule) -> int:
    """Bytes of a frozen graph's parameters, those that one quantizer alone reads at its width.

    The scales of weights and activations are counted too, each as float32; zero_points, a byte at
    most each, are left out, and a bias is as large in int32 as in float32.
    """
    readers: dict[str, set[Any]] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(str(node.target), set()).update(
                submodule(gm, user) or user for user in node.users
            )
    stored = 0
    for name, value in _parameters(gm).items():
        (reader, *others) = readers[name] or {None}
        alone = isinstance(reader, Quantizer) and not others
        stored += value.numel() * (reader.bits if alone else 32)
    scales = sum(
        4 * buffer.numel()
        for module in gm.modules()
        if isinstance(module, Quantizer)
        for name, buffer in module.named_buffers()
        if name == "scale"
    )
    return round(stored / 8) + scales


def _parameters(gm: fx.GraphModule) -> dict[str, Tensor]:
    """The parameters that a graph reads, by name."""
    nodes = {str(node.target): node for node in gm.graph.nodes if node.op == "get_attr"}
    return {name: get_parameter(gm, node) for name, node in nodes.items()}
