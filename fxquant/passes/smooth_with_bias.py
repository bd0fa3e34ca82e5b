"""SQ-b: SmoothQuant with a bias (MPTQ-ViT, arXiv 2401.14895).

Before: ``W y + b``, y from a norm, or values V averaged by attention
After:  ``W' y' + b'`` with ``y' = (y - mu) / eps``, ``W' = W diag(eps)``, ``b' = b + W mu``

The map that makes ``y'`` is folded into the norm or into the linear that gives V, so that the
function is unchanged and nothing is added to the run time (:mod:`fxquant.smoothing.affine_fold`).
A comparison is the loss of the network with the site's products quantized, with the map over
without it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from fxquant.config.vocabulary import Stage
from fxquant.graph.meta import SMOOTHED
from fxquant.passes.base import Comparison, PassResult, skipped
from fxquant.smoothing.affine_fold import fold
from fxquant.smoothing.choose import FoldDecisions


@dataclass(frozen=True)
class SmoothWithBias:
    """Folds the chosen scales and shifts into norms and linears.

    Attributes:
        choices: folds by site (``fxquant.smoothing.choose.choose_smoothing`` on this graph).
    """

    choices: FoldDecisions = field(repr=False)
    requires: ClassVar[Stage] = Stage.ANNOTATED
    ensures: ClassVar[Stage] = Stage.ANNOTATED

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        """Folds every chosen map into the graph, once."""
        if SMOOTHED.get(gm):
            return PassResult(0)
        SMOOTHED.set(gm, True)
        for choice in self.choices.folds.values():
            fold(gm, choice.site, choice.smoothing.divide, choice.smoothing.shift)
        gm.graph.eliminate_dead_code()
        gm.delete_all_unused_submodules()
        notes = tuple(skipped(name, reason) for name, reason in self.choices.refused.items())
        comparisons = tuple(
            Comparison(name, choice.smoothing.name, "loss of the network", choice.gain)
            for name, choice in self.choices.folds.items()
        )
        return PassResult(len(self.choices.folds), notes, comparisons)
