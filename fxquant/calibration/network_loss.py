"""The loss of a network in which functions replace the computation of some nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.config.scale_search import GradientLoss
from fxquant.errors import CalibrationError
from fxquant.graph.interpreter import GraphInterpreter
from fxquant.graph.liveness import dead_after
from fxquant.graph.meta import EMBEDDINGS
from fxquant.graph.outputs import float_outputs, is_logits

# A function that is called instead of a node, with the arguments of the node.
Override = Callable[..., Any]


class OutputDistance:
    """Distance of outputs from the float ones, as a mean over images.

    The distance of logits ``(B, C)`` is the Kullback-Leibler divergence ``KL(float || quantized)``
    in nats. For other outputs, among them embeddings ``(B, C)``, and for all where the policy's
    loss is gaussian, it is half the squared distance. The gradients of the policy's search estimate
    the second derivatives of these losses (:class:`fxquant.config.scale_search.GradientLoss`).

    Args:
        reference: the float outputs.
        loss: the loss of the policy's search.
        embeddings: positions, among the float outputs, of outputs ``(B, C)`` that are not logits.
    """

    def __init__(
        self, reference: Any, loss: GradientLoss, embeddings: frozenset[int] | None = None
    ) -> None:
        self._reference, self._loss = float_outputs(reference), loss
        self._embeddings = embeddings or frozenset()
        if not self._reference:
            raise CalibrationError(
                "no output of the model is a float tensor, and no loss can be measured: remove the "
                "argmax from the model, or leave allocation and smoothing out of the policy"
            )

    def __call__(self, outputs: Any) -> float:
        """The distance of outputs for the same images."""
        pairs = zip(self._reference, float_outputs(outputs), strict=True)
        return sum(self._distance(i, *pair) for i, pair in enumerate(pairs))

    def _distance(self, position: int, reference: Tensor, output: Tensor) -> float:
        expected, actual = reference.double(), output.double()
        # Values that the model masks with infinity are infinite in both, and count as equal.
        logits = is_logits(expected) and position not in self._embeddings
        if self._loss is GradientLoss.GAUSSIAN or not logits:
            return float(_difference(expected, actual).square().sum() / 2 / len(expected))
        expected, actual = expected.log_softmax(1), actual.log_softmax(1)
        divergence = (expected.exp() * _difference(expected, actual)).sum() / len(expected)
        return max(float(divergence), 0.0)


def _difference(expected: Tensor, actual: Tensor) -> Tensor:
    return torch.where(expected == actual, 0.0, expected - actual)


class NetworkLoss(GraphInterpreter):
    """Measures the loss of a graph in which functions replace the computation of some nodes.

    The float run computes the graph once and keeps the values that later nodes read; a run with
    changed nodes starts from these values at the first of the changed nodes. Therefore changes must
    come in the order of the graph. Observers in the graph record nothing.

    Args:
        gm: the float graph.
        images: ``(B, …)`` on the graph's device.
        loss: the loss of the policy's search.
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
        self._distance = OutputDistance(self._run({}, 0), loss, EMBEDDINGS.get(gm))

    @torch.no_grad()
    def changed(self, overrides: Mapping[fx.Node, Override]) -> float:
        """The loss with some nodes changed, none of them before the nodes of earlier calls."""
        start = min(self.place[node] for node in overrides)
        self._advance(start)
        self._overrides = overrides
        return self._distance(self._run(dict(self._float), start))

    @torch.no_grad()
    def changed_anywhere(self, overrides: Mapping[fx.Node, Override]) -> float:
        """The loss with any nodes changed, from a run of the whole network."""
        self._overrides = overrides
        return self._distance(self._run({}, 0))

    def _advance(self, place: int) -> None:
        """Continues the float run up to a node, without running this node."""
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
        """Runs a node, or its override."""
        if n.op == "placeholder":
            return self._images.clone()  # some models change their input in place
        override = self._overrides.get(n)
        if override is not None:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return override(*args, **kwargs)
        if n.op == "call_module":  # an observer, which must record nothing
            return self.fetch_args_kwargs_from_env(n)[0][0]
        return super().run_node(n)
