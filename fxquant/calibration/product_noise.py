"""Measures the noise that quantization adds to each product, on the values of the float network.

The loss of the network would say more, but only of a network that works: with 3 bits and ranges
that are not searched yet, outputs may be wrong whatever is done. The noise of single products has
no such limit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxquant.graph.dialect import op_kind
from fxquant.graph.interpreter import GraphInterpreter


@torch.no_grad()
def product_noise(gm: fx.GraphModule, images: Tensor) -> float:
    """The sum, over all products, of the squared error of the output over the squared output.

    Each product reads the values of the float network, through its quantizers. A noise above one,
    which is worse than an output of zeros, counts as one: otherwise a single product that its
    observer's range does not suit could hide all others.

    Args:
        gm: in stage FROZEN.
        images: ``(B, …)`` on the graph's device; not changed.
    """
    recorder = _NoiseRecorder(gm)
    recorder.run(images.clone())  # some models change their input in place
    return sum(recorder.noises)


class _NoiseRecorder(GraphInterpreter):
    """Runs a quantized graph in float, and each product with quantized inputs too."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.noises: list[float] = []

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node in float; of a product it records the noise."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op == "call_module":
            return args[0]
        value = super().run_node(n)
        kind = op_kind(n)
        if kind is not None and kind.is_product:
            quantized = [
                self.submodules[str(node.target)](x)
                if isinstance(node, fx.Node) and node.op == "call_module"
                else x
                for node, x in zip(n.args, args, strict=True)
            ]
            error = self.call_function(n.target, tuple(quantized), kwargs) - value
            energy = float(value.double().square().sum())
            noise = float(error.double().square().sum()) / max(energy, 1e-30)
            self.noises.append(min(noise, 1.0))
        return value
