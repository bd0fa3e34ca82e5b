"""The loss of a network with some groups quantized, from runs of the part behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxquant.errors import CalibrationError, NonFiniteError
from fxquant.sensitivity.groups import EdgeGroup
from fxquant.sensitivity.trials import Trials
from fxquant.spec import GradientLoss


class OutputDistance:
    """How far outputs are from the float ones, a mean over images.

    Logits ``(B, C)`` by the Kullback-Leibler divergence ``KL(float || quantized)`` in nats; other
    outputs, and all where the policy's loss is gaussian, by half the squared distance: the
    losses whose second derivatives the gradients of the same outputs stand for
    (:class:`fxquant.spec.GradientLoss`).

    Args:
        reference: the float outputs.
        loss: that the policy's search names.
    """

    def __init__(self, reference: Any, loss: GradientLoss) -> None:
        self._reference, self._loss = _float_outputs(reference), loss
        if not self._reference:
            raise CalibrationError(
                "no output of the model is a float tensor, so no loss can be measured: take the "
                "argmax out of the model, or leave allocation out of the policy"
            )

    def __call__(self, outputs: Any) -> float:
        """The distance of outputs of the same images."""
        found = _float_outputs(outputs)
        return sum(self._of(a, b) for a, b in zip(self._reference, found, strict=True))

    def _of(self, reference: Tensor, output: Tensor) -> float:
        one, two = reference.double(), output.double()
        if self._loss is GradientLoss.GAUSSIAN or one.ndim != 2 or one.shape[1] < 2:
            return float((one - two).square().sum() / 2 / len(one))
        one, two = one.log_softmax(1), two.log_softmax(1)
        return max(float((one.exp() * (one - two)).sum() / len(one)), 0.0)


def _float_outputs(outputs: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(outputs)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


class Network(fx.Interpreter):
    """Runs an observed graph with groups quantized, observers recording nothing.

    The float run advances through the graph once, holding only the values still to be read; a
    run with one group quantized starts from them.

    Args:
        gm: in stage OBSERVED.
        trials: its quantizers.
        images: ``(B, …)`` on the graph's device.
        loss: that the policy's search names.
    """

    def __init__(
        self, gm: fx.GraphModule, trials: Trials, images: Tensor, loss: GradientLoss
    ) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.extra_traceback = False  # it would be added to our own messages
        self._trials, self._images = trials, images
        self._nodes = list(gm.graph.nodes)
        self._place = {node: i for i, node in enumerate(self._nodes)}
        last = {used: node for node in self._nodes for used in node.all_input_nodes}
        self._dying: dict[fx.Node, list[fx.Node]] = {}
        for used, node in last.items():
            self._dying.setdefault(node, []).append(used)
        self._activations: dict[fx.Node, Callable[[Tensor], Tensor]] = {}
        self._weights: dict[fx.Node, Tensor] = {}
        self._float: dict[fx.Node, Any] = {}
        self._reached = 0
        self._distance = OutputDistance(self._run({}, 0), loss)

    def in_order(self, groups: Sequence[EdgeGroup]) -> list[EdgeGroup]:
        """Groups as the graph reaches them."""
        return sorted(groups, key=self._start)

    @torch.no_grad()
    def alone(self, group: EdgeGroup, bits: int) -> float:
        """The loss with one group quantized; groups are to come in the order of the graph."""
        start = self._start(group)
        self._advance(start)
        self._quantize([(group, bits)])
        return self._loss(dict(self._float), start, f"{group.name} at {bits} bits")

    @torch.no_grad()
    def together(self, groups: Sequence[EdgeGroup], bits: Sequence[int]) -> float:
        """The loss with all groups quantized, each at its width."""
        self._quantize(list(zip(groups, bits, strict=True)))
        return self._loss({}, 0, "all groups")

    def _start(self, group: EdgeGroup) -> int:
        """Place of the first node whose value changes."""
        nodes = [e.node for e in group.edges] if group.is_weight else group.sources
        return min(self._place[node] for node in nodes)

    def _quantize(self, chosen: list[tuple[EdgeGroup, int]]) -> None:
        self._activations, self._weights = {}, {}
        for group, bits in chosen:
            if group.is_weight:
                self._weights |= self._trials.weights(group, bits)
            else:
                quantizer = self._trials.quantizer(group.edges[0], bits)
                self._activations |= {node: quantizer for node in group.sources}

    def _advance(self, place: int) -> None:
        """Takes the float run up to a node, which is not yet run."""
        self._activations, self._weights = {}, {}
        assert place >= self._reached, "groups come in the order of the graph"
        self.env = self._float
        for node in self._nodes[self._reached : place]:
            self._step(node)
        self._reached = place

    @torch.no_grad()
    def _run(self, values: dict[fx.Node, Any], start: int) -> Any:
        self.env = values
        for node in self._nodes[start:]:
            self._step(node)
        return self.env[self._nodes[-1]]

    def _loss(self, values: dict[fx.Node, Any], start: int, what: str) -> float:
        loss = self._distance(self._run(values, start))
        if not loss < float("inf"):
            raise NonFiniteError(
                f"with {what} the outputs hold NaN or infinity; pin the width of that edge with a "
                "rule (pinned: true), or leave narrow widths out"
            )
        return loss

    def _step(self, node: fx.Node) -> None:
        self.env[node] = self.run_node(node)
        for used in self._dying.get(node, ()):
            del self.env[used]

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node, quantized if it is one of those to be."""
        if n.op == "placeholder":
            return self._images.clone()  # some models change their input in place
        if n.op == "call_module":
            (value,), _ = self.fetch_args_kwargs_from_env(n)
            quantizer = self._activations.get(n)
            return value if quantizer is None else quantizer(value)
        if n in self._weights:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return n.target(args[0], self._weights[n], *args[2:], **kwargs)  # type: ignore[operator]
        return super().run_node(n)
