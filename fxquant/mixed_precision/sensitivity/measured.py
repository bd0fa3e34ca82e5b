"""The loss of a network with some groups quantized."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, fx

from fxquant.calibration.network_loss import NetworkLoss, Override
from fxquant.config.scale_search import GradientLoss
from fxquant.errors import NonFiniteError
from fxquant.mixed_precision.sensitivity.groups import EdgeGroup
from fxquant.mixed_precision.sensitivity.trial_quantizers import TrialQuantizers


class MeasuredSensitivity:
    """An observed graph run with groups quantized.

    Args:
        gm: in stage OBSERVED.
        trials: quantizers of the graph at any width.
        images: ``(B, …)`` on the graph's device.
        loss: the loss that the policy's search names.
    """

    def __init__(
        self, gm: fx.GraphModule, trials: TrialQuantizers, images: Tensor, loss: GradientLoss
    ) -> None:
        self._network, self._trials = NetworkLoss(gm, images, loss), trials

    def in_order(self, groups: Sequence[EdgeGroup]) -> list[EdgeGroup]:
        """Groups in the order in which the graph computes them."""

        def first(group: EdgeGroup) -> int:
            nodes = [e.node for e in group.edges] if group.is_weight else group.sources
            return min(self._network.place[node] for node in nodes)

        return sorted(groups, key=first)

    def of_group(self, group: EdgeGroup, bits: int) -> float:
        """The loss with one group quantized; call in the order of :meth:`in_order`."""
        loss = self._network.changed(self._overrides(group, bits))
        return _checked(loss, f"{group.name} at {bits} bits")

    def of_all(self, groups: Sequence[EdgeGroup], bits: Sequence[int]) -> float:
        """The loss with all groups quantized, each at its width."""
        overrides: dict[fx.Node, Override] = {}
        for group, width in zip(groups, bits, strict=True):
            overrides |= self._overrides(group, width)
        return _checked(self._network.changed_anywhere(overrides), "all groups")

    def _overrides(self, group: EdgeGroup, bits: int) -> dict[fx.Node, Override]:
        if not group.is_weight:
            return dict.fromkeys(group.sources, self._trials.quantizer(group.edges[0], bits))
        weights = self._trials.weights(group, bits)
        return {
            node: partial(_with_weight, node.target, weight) for node, weight in weights.items()
        }


def _with_weight(target: Any, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    return target(args[0], weight, *args[2:], **kwargs)


def _checked(loss: float, what: str) -> float:
    if not loss < float("inf"):
        raise NonFiniteError(
            f"with {what} the outputs hold NaN or infinity; pin the width of that edge with a "
            "rule (pinned: true), or remove narrow widths",
            got=loss,
            expected="a finite number",
        )
    return loss
