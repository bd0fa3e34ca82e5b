"""Rotates residual streams, which spreads outlying channels over all channels.

Before: ``x = x + W2 f(W1 LN(x))``
After:  ``x' = x' + (Q W2) f((W1 diag(gamma) Q^T) LN'(x'))`` with ``x' = Q x``, ``Q`` orthogonal

``LN'`` is the LayerNorm without weight and bias, which are folded into the linears behind it. A
LayerNorm subtracts the mean over channels; with ``Q 1 = 1``, ``mean(Q x) = mean(x)`` and ``LN'(Q x)
= Q LN'(x)``: the norm stays a LayerNorm. Published rotations turn it into an RMSNorm first (QuaRot,
arXiv 2404.00456, section 4; SpinQuant, arXiv 2405.16406). Behind an RMSNorm any orthogonal ``Q``
has this property.

The streams are found by structure (:mod:`fxquant.rotation.trace`), each gets its own ``Q``. Where
another operation reads or writes a stream, a linear undoes the rotation at run time; a stream that
would need many multiplications for this is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.config.validation import check_number, check_seed
from fxquant.config.vocabulary import Stage
from fxquant.passes.base import PassResult, claim_rotation, skipped
from fxquant.rotation.orthogonal import mean_preserving, orthogonal
from fxquant.rotation.plan import plan_rotation
from fxquant.rotation.trace import trace_flow
from fxquant.rotation.turn import turn_streams


@dataclass(frozen=True)
class RotateResidual:
    """Rotates every residual stream whose rotation folds into the products around it.

    Attributes:
        seed: seed of the random rotations.
        max_overhead: largest number of multiplications that linears at run time may add, as a share
            of the network's.
    """

    seed: int = 0
    max_overhead: float = 0.03
    requires: ClassVar[Stage] = Stage.FLOAT
    ensures: ClassVar[Stage] = Stage.FLOAT

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            PolicyError: an option is out of its range.
        """
        check_seed(self)
        check_number(self, "max_overhead", (0.0, 100.0))

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        """Rotates each stream once; a second run changes nothing."""
        if not claim_rotation(gm, self):
            return PassResult(0)
        flow = trace_flow(gm)
        plan = plan_rotation(gm, flow, self.max_overhead)
        draw = {True: mean_preserving, False: orthogonal}
        rotations = {
            stream.number: draw[stream.keeps_mean](stream.width, self.seed + 1000 * i)
            for i, stream in enumerate(plan.rotated)
        }
        turn_streams(gm, flow, rotations)
        gm.graph.eliminate_dead_code()
        gm.delete_all_unused_submodules()
        notes = tuple(skipped(site, reason) for site, reason in plan.refused.items())
        return PassResult(len(rotations), notes)
