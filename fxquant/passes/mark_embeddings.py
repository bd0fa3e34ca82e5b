"""Marks outputs that are embeddings, so that losses compare them by squared distance.

Outputs ``(B, C)`` may be logits or embeddings. The loss of logits is a divergence or a margin
between classes, the loss of all other outputs the squared distance (the Gaussian loss of
:class:`fxquant.config.scale_search.GradientLoss`). ``graph/embeddings.py`` has the rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxquant.config.vocabulary import Stage
from fxquant.graph.embeddings import embedding_reason, float_output_nodes
from fxquant.graph.meta import EMBEDDINGS
from fxquant.graph.outputs import is_logits
from fxquant.passes.base import Note, NoteKind, PassResult

_LOSS = "its loss is the squared distance (gaussian)"


@dataclass(frozen=True)
class MarkEmbeddings:
    """Marks outputs ``(B, C)`` that are embeddings.

    Attributes:
        compared: whether a step of the policy compares outputs; a note then names each output that
            is not logits, and its loss.
    """

    compared: bool = True

    requires: ClassVar[Stage] = Stage.FLOAT
    ensures: ClassVar[Stage] = Stage.FLOAT

    def run(self, gm: fx.GraphModule) -> PassResult:
        """Annotates the graph with the positions of embeddings; its nodes stay the same."""
        embeddings, notes = set[int](), list[Note]()
        for position, node in enumerate(float_output_nodes(gm)):
            sizes = node.meta["val"].shape
            shape = ", ".join(str(size) if isinstance(size, int) else "B" for size in sizes)
            if not is_logits(node.meta["val"]):
                reason = f"its shape ({shape}) is not that of logits"
            elif (why := embedding_reason(gm, node)) is not None:
                embeddings.add(position)
                reason = f"it counts as an embedding ({shape}), since {why}"
            else:
                continue
            if self.compared:
                notes.append(Note(NoteKind.OUTPUT, f"output {position}", f"{reason}: {_LOSS}"))
        changed = embeddings != (EMBEDDINGS.get(gm) or set())
        EMBEDDINGS.set(gm, frozenset(embeddings))
        return PassResult(len(embeddings) if changed else 0, tuple(notes))
