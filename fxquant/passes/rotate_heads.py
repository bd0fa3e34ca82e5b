"""Rotates queries, keys and values within each head.

Before: ``softmax(q k^T) v W^T``
After:  ``softmax((R q) (R k)^T) (S v) (W S^T)^T`` with orthogonal ``R`` and ``S`` for each head

The rotations are folded into the weights of the linears around attention, as QuaRot's of the values
(arXiv 2404.00456, section 4.2), and cost nothing at run time. Queries and keys that anything but
data movement changes before their product stay as they are: a rotary embedding, a norm of queries,
a relative position that reads queries. Heads that share keys or values are refused too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.config.validation import check_seed
from fxquant.config.vocabulary import Stage
from fxquant.passes.base import PassResult, Refusal, claim_rotation, skipped
from fxquant.rotation.heads import head_sites, turn_heads
from fxquant.rotation.orthogonal import orthogonal


@dataclass(frozen=True)
class RotateHeads:
    """Rotates the channels of each head of attention.

    Attributes:
        seed: seed of the random rotations.
    """

    seed: int = 0
    requires: ClassVar[Stage] = Stage.FLOAT
    ensures: ClassVar[Stage] = Stage.FLOAT

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            PolicyError: an option is out of its range.
        """
        check_seed(self)

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        """Rotates at each attention product once; a second run changes nothing."""
        if not claim_rotation(gm, self):
            return PassResult(0)
        changed, notes, seed = 0, [], self.seed
        for product, site in list(head_sites(gm)):
            if isinstance(site, Refusal):
                notes.append(skipped(product.name, f"its heads are not rotated: {site}"))
                continue
            heads, width = site.shape
            seed += 1000
            matrices = [orthogonal(width, seed + head) for head in range(heads)]
            turn_heads(gm, site, torch.stack(matrices))
            changed += 1
        gm.graph.eliminate_dead_code()
        gm.delete_all_unused_submodules()
        return PassResult(changed, tuple(notes))
