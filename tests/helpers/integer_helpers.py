"""Compares an integer form with the simulation, code by code.

The simulation is run with every quantizer's output replaced by the values of the codes that the
integer form produced. Each operation of either then has the same quantized inputs, and all that
may differ is the float32 rounding of what lies between two quantizers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fxquant.graph.nodes import get_parameter
from tests.helpers.ties import IntegerQuantizer, from_tie, places


@dataclass(frozen=True)
class Difference:
    """Codes of one quantizer that differ.

    Attributes:
        where: name of the quantizer.
        bits: width of its codes.
        count: how many differ.
        entries: of how many.
        largest: by how many values of the quantizer.
        tie: largest distance from half-way between the two values, in units of their gap.
    """

    where: str
    bits: int
    count: int
    entries: int
    largest: int
    tie: float

    @property
    def tie_limit(self) -> float:
        """How far from a tie float32 rounding can account for a difference, in steps.

        A thousandth; or, for wide codes, a few units in the last place of x / scale.
        """
        return max(1e-3, 4 * torch.finfo(torch.float32).eps * 2**self.bits)

    @property
    def explained(self) -> bool:
        """Few codes differ, by one, each near a tie; values near a tie are as rare as its width."""
        few = self.count <= self.entries * self.tie_limit
        return few and self.largest <= 1 and self.tie <= self.tie_limit

    def __str__(self) -> str:
        return (
            f"{self.where}: {self.count} of {self.entries} codes differ, by up to {self.largest}, "
            f"lying up to {self.tie:.1e} of a step from a rounding tie"
        )


class Recorder(fx.Interpreter):
    """Runs a graph and keeps the output of every module and constant by its name."""

    def __init__(self, gm):
        super().__init__(gm)
        self.outputs = {}

    def run_node(self, n):
        value = super().run_node(n)
        if n.op in ("call_module", "get_attr"):
            self.outputs[n.target] = value
        return value


class Forced(fx.Interpreter):
    """Runs the simulation on given codes and compares its own with them."""

    def __init__(self, gm, codes):
        super().__init__(gm)
        self.codes, self.differences = codes, []

    def call_module(self, target, args, kwargs):
        quantizer = self.fetch_attr(target)
        if not isinstance(quantizer, IntegerQuantizer):
            return super().call_module(target, args, kwargs)
        given = self.codes[target].float()
        own = quantizer.quantize(args[0])
        apart = own != given
        distance = from_tie(quantizer, args[0], own, given)[apart]
        self.differences.append(
            Difference(
                target,
                quantizer.bits,
                int(apart.sum()),
                own.numel(),
                int((places(quantizer, own) - places(quantizer, given)).abs().max()),
                float(distance.max()) if len(distance) else 0.0,
            )
        )
        return quantizer.dequantize(given)


def compare(gm, lowered, x):
    """Differences at each quantizer, and the outputs ``(simulated on the same codes, integer)``."""
    recorder = Recorder(lowered)
    out = recorder.run(x)
    codes = {name: recorder.outputs[at] for name, at in lowered.meta["codes"].items()}
    forced = Forced(gm, codes)
    return forced.run(x), out, forced.differences


def assert_integer_equals_simulation(gm, lowered, x):
    """The two forms give the same codes up to ties, and the same outputs."""
    with torch.no_grad():
        simulated, out, differences = compare(gm, lowered, x)
        assert differences
        for difference in differences:
            assert difference.explained, str(difference)
        torch.testing.assert_close(
            out, simulated, rtol=1e-5, atol=float(1e-5 * simulated.abs().max())
        )


def code_buffers(lowered):
    """Integer constants of a lowered graph by name."""
    return {
        node.target: get_parameter(lowered, node)
        for node in lowered.graph.nodes
        if node.op == "get_attr" and not get_parameter(lowered, node).is_floating_point()
    }
