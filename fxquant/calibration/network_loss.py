"""The loss of a network some of whose nodes compute something else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.config.scale_search import GradientLoss
from fxquant.errors import CalibrationError
from fxquant.graph.interpreter import GraphInterpreter
from fxquant.graph.liveness import dead_after
from fxquant.graph.outputs import float_outputs, is_logits

# What a node computes instead, from the arguments of its call.
Override = Callable[..., Any]


class OutputDistance:
    """How far outputs are from the float ones, a mean over images.

    Logits ``(B, C)`` by the Kullback-Leibler divergence ``KL(float || quantized)`` in nats; other
    outputs, and all where the policy's loss is gaussian, by half the squared distance: the
    losses whose second derivatives the gradients of the same outputs stand for
    (:class:`fxquant.config.scale_search.GradientLoss`).

    Args:
        reference: the float outputs.
        loss: that the policy's search names.
    """

    def __init__(self, reference: Any, loss: GradientLoss) -> None:
        self._reference, self._loss = float_outputs(reference), loss
        if not self._reference:
            raise CalibrationError(
                "no output of the model is a float tensor, so no loss can be measured: take the "
                "argmax out of the model, or leave allocation and smoothing out of the policy"
            )

    def __call__(self, outputs: Any) -> float:
        """The distance of outputs of the same images."""
        found = float_outputs(outputs)
        return sum(self._of(a, b) for a, b in zip(self._reference, found, strict=True))

    def _of(self, reference: Tensor, output: Tensor) -> float:
        one, two = reference.double(), output.double()
        # What the model masks with infinity is masked in both.
        if self._loss is GradientLoss.GAUSSIAN or not is_logits(one):
            return float(_gap(one, two).square().sum() / 2 / len(one))
        one, two = one.log_softmax(1), two.log_softmax(1)
        return max(float((one.exp() * _gap(one, two)).sum() / len(one)), 0.0)


def _gap(one: Tensor, two: Tensor) -> Tensor:
    return torch.where(one == two, 0.0, one - two)


class NetworkLoss(GraphInterpreter):
    """Runs a graph, its observers recording nothing, with other computations in some nodes.

    The float run advances through the graph once, holding only the values still to be read; a
    run that changes a node starts from them. So changes are to come in the order of the graph.

    Args:
        gm: the float graph.
        images: ``(B, …)`` on the graph's device.
        loss: that the policy's search names.
    """

    def __init__(self, gm: fx.GraphModule, images: Tensor, loss: GradientLoss) -> None:
        super().__init__(gm, keep_values=True)
        self._images = images
        self._nodes = list(gm.graph.nodes)
        self.place = {node: i for i, node in enumerate(self._nodes)}
        self._dead_after = dead_after(self._nodes)
        self._overrides: Mapping[fx.Node, Override] = {}
        self._float: dict[fx.Node, Any] = {}
        self._reached = 0
        self._distance = OutputDistance(self._run({}, 0), loss)

    @torch.no_grad()
    def changed(self, overrides: Mapping[fx.Node, Override]) -> float:
        """The loss with some nodes changed, the first of them behind those of earlier calls."""
        start = min(self.place[node] for node in overrides)
        self._advance(start)
        self._overrides = overrides
        return self._distance(self._run(dict(self._float), start))

    @torch.no_grad()
    def anew(self, overrides: Mapping[fx.Node, Override]) -> float:
        """The loss with any nodes changed, from a run of all the network."""
        self._overrides = overrides
        return self._distance(self._run({}, 0))

    def _advance(self, place: int) -> None:
        """Takes the float run up to a node, which is not yet run."""
        assert place >= self._reached, "changes come in the order of the graph"
        self._overrides, self.env = {}, self._float
        for node in self._nodes[self._reached : place]:
            self._step(node)
        self._reached = place

    @torch.no_grad()
    def _run(self, values: dict[fx.Node, Any], start: int) -> Any:
        self.env = values
        for node in self._nodes[start:]:
            self._step(node)
        return self.env[self._nodes[-1]]

    def _step(self, node: fx.Node) -> None:
        self.env[node] = self.run_node(node)
        for value in self._dead_after.get(node, ()):
            del self.env[value]

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node, or what stands in its place."""
        if n.op == "placeholder":
            return self._images.clone()  # some models change their input in place
        override = self._overrides.get(n)
        if override is not None:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return override(*args, **kwargs)
        if n.op == "call_module":  # an observer, which is to record nothing
            return self.fetch_args_kwargs_from_env(n)[0][0]
        return super().run_node(n)
