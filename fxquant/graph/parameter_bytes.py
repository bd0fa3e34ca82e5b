"""Bytes of the parameters of a graph, before and after quantization."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from fxquant.graph.nodes import get_parameter, submodule
from fxquant.quantizers import Quantizer


def float_bytes(gm: fx.GraphModule) -> int:
    """Bytes of the parameters that a graph in stage FLOAT reads; a shared one counts once."""
    return sum(4 * value.numel() for value in _parameters(gm).values())


def quantized_bytes(gm: fx.GraphModule) -> int:
    """Bytes of the parameters of a frozen graph.

    A parameter that a single quantizer reads counts with the width of its codes, any other one as
    float32; a bias is as large in int32. Scales of weights and activations count as float32,
    zero_points, which are at most a byte each, do not count.
    """
    readers: dict[str, set[Any]] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(str(node.target), set()).update(
                submodule(gm, user) or user for user in node.users
            )
    stored_bits = 0
    for name, value in _parameters(gm).items():
        (reader, *further) = readers[name] or {None}
        coded = isinstance(reader, Quantizer) and not further
        stored_bits += value.numel() * (reader.bits if coded else 32)
    scales = sum(
        4 * buffer.numel()
        for module in gm.modules()
        if isinstance(module, Quantizer)
        for name, buffer in module.named_buffers()
        if name == "scale"
    )
    return round(stored_bits / 8) + scales


def _parameters(gm: fx.GraphModule) -> dict[str, Tensor]:
    """The parameters that a graph reads, by name."""
    nodes = {str(node.target): node for node in gm.graph.nodes if node.op == "get_attr"}
    return {name: get_parameter(gm, node) for name, node in nodes.items()}
