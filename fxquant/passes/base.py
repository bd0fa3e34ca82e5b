"""The contract of a pass.

A pass is a frozen dataclass around a free function. Its fields are its options; ``requires`` is the
stage of the graph before the pass, ``ensures`` the stage after it. A pass returns the number of
sites that it changed, a note with a reason for each site that it did not change, and, where it
chose among several forms, a comparison of their errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import fx

from fxquant.config.vocabulary import Stage
from fxquant.graph.meta import ROTATED
from fxquant.utils.notes import Comparison, Note, NoteKind, Refusal, skipped

__all__ = [
    "Comparison",
    "Note",
    "NoteKind",
    "Pass",
    "PassResult",
    "Refusal",
    "claim_rotation",
    "skipped",
]


@dataclass(frozen=True)
class PassResult:
    """The result of a pass.

    Attributes:
        changed: number of sites rewritten or annotated.
        notes: the sites that the pass did not change, with reasons, and other remarks.
        comparisons: errors with the pass's choices over errors without them, of a pass that
            compares.
    """

    changed: int
    notes: tuple[Note, ...] = ()
    comparisons: tuple[Comparison, ...] = ()


class Pass(Protocol):
    """A step of the compiler; implemented by frozen dataclasses."""

    requires: ClassVar[Stage]
    ensures: ClassVar[Stage]

    def run(self, gm: fx.GraphModule) -> PassResult:
        """Edits ``gm`` in place and returns the number of changes, notes and comparisons."""


def claim_rotation(gm: fx.GraphModule, rotation: Pass) -> bool:
    """Marks that a rotation has run on the graph; False where it had run before."""
    name, rotated = type(rotation).__name__, ROTATED.get(gm) or frozenset()
    ROTATED.set(gm, rotated | {name})
    return name not in rotated
