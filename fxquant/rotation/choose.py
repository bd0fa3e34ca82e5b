"""Chooses rotations by the noise that quantization adds to each product.

The loss of the network would say more, but only of a network that works: with 3 bits and ranges
that are not searched yet, outputs are wrong with and without a rotation. The noise of each product
on the float network's values has no such limit, and tells networks with outlying channels from
others at any width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.calibration.observe import observe
from fxquant.config.spec import Granularity, ObserverKind
from fxquant.graph.capture import device_of
from fxquant.graph.dialect import op_kind
from fxquant.graph.interpreter import GraphInterpreter
from fxquant.passes.assign_specs import AssignSpecs
from fxquant.passes.base import Pass, Refusal
from fxquant.passes.centre_heads import CentreHeads
from fxquant.passes.defer_softmax import DeferSoftmax
from fxquant.passes.freeze import Freeze
from fxquant.passes.insert_observers import InsertObservers
from fxquant.passes.pipeline import run_passes
from fxquant.policies.policy import Policy, Rule
from fxquant.quantizers import has_uniform_grid
from fxquant.smoothing.channel_ranges import head_ranges

# Images that a trial quantizes.
_IMAGES = 8


@dataclass(frozen=True)
class Candidate:
    """Rotations that are made together or not at all.

    Attributes:
        passes: the rotations.
        max_noise_ratio: largest noise with the rotations over the noise without.
    """

    passes: tuple[Pass, ...]
    max_noise_ratio: float


@torch.no_grad()
def choose_rotations(
    gm: fx.GraphModule, recipe: Policy, images: Tensor, candidates: Iterable[Candidate]
) -> list[tuple[Candidate, Refusal | None]]:
    """Decides about rotations one after the other, each on top of those that are made.

    A trial changes a copy of the network as the policy asks for and fits quantizers to the images
    (those of activations, where uniform, by least squared error). Its noise is the sum, over all
    quantized products, of the squared error of the output over the squared output; each product
    reads the values of the float network.

    Args:
        gm: in stage FLOAT, not changed.
        recipe: the rules, and the changes of the float network that come after rotations.
        images: ``(B, …)``; the first eight are used.
        candidates: rotations in order.

    Returns:
        Each candidate with None, or with the reason why it is not made.
    """
    images = images[:_IMAGES].to(device_of(gm))
    decisions: list[tuple[Candidate, Refusal | None]] = []
    made: tuple[Pass, ...] = ()
    least = _noise(_quantized(gm, recipe, images, made), images)
    for candidate in candidates:
        rotations = (*made, *candidate.passes)
        noise = _noise(_quantized(gm, recipe, images, rotations), images)
        if noise < candidate.max_noise_ratio * least:
            made, least = rotations, noise
            decisions.append((candidate, None))
            continue
        reason = (
            f"the noise of products would be {noise / max(least, 1e-30):.2f} of that without, and "
            f"{candidate.max_noise_ratio} is asked for"
        )
        decisions.append((candidate, Refusal(reason)))
    return decisions


def _quantized(
    gm: fx.GraphModule, recipe: Policy, images: Tensor, rotations: tuple[Pass, ...]
) -> fx.GraphModule:
    """A quantized copy of a graph, rotated first; passes replace parameters and share the rest."""
    trial = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    trial.meta = dict(gm.meta)
    run_passes(trial, rotations)
    if recipe.centre_heads:
        run_passes(trial, [CentreHeads(head_ranges(trial, [images]))])
    if recipe.defer_softmax:
        run_passes(trial, [DeferSoftmax()])
    run_passes(trial, [AssignSpecs(tuple(map(_fitted, recipe.rules))), InsertObservers()])
    observe(trial, [(images, None)])
    run_passes(trial, [Freeze()])
    return trial


def _fitted(rule: Rule) -> Rule:
    """The rule with least squared error instead of min-max; a range a channel would take long."""
    spec = rule.spec
    if spec is None or spec.observer is not ObserverKind.MINMAX or not has_uniform_grid(spec):
        return rule
    if spec.granularity is Granularity.CHANNEL:
        return rule
    return replace(rule, spec=replace(spec, observer=ObserverKind.MSE))


def _noise(gm: fx.GraphModule, images: Tensor) -> float:
    """The sum of the noises of a quantized graph's products."""
    recorder = _Noises(gm)
    recorder.run(images.clone())  # some models change their input in place
    return sum(recorder.noises)


class _Noises(GraphInterpreter):
    """Runs a quantized graph in float, and each quantized product in both ways."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.noises: list[float] = []

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node in float."""
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
            energy = value.double().square().sum().clamp(min=1e-30)
            self.noises.append(float(error.double().square().sum() / energy))
        return value
