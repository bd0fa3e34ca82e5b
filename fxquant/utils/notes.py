"""Notes and comparisons that the steps of the compiler leave for the report."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class NoteKind(StrEnum):
    """The kinds of notes.

    Attributes:
        UNSUPPORTED: a node has no quantized form, and stays float whatever the rules ask for.
        FLOAT: an edge stays float.
        ADJUSTED: an edge is quantized in another way than its rule asks for.
        RULE: a rule decides nothing.
        SKIPPED: a pass looked at a site and did not change it.
        OUTPUT: errors of an output are compared in another way than errors of logits.
        MODEL: the model itself has something odd, which the compiled model may not keep.
    """

    UNSUPPORTED = "unsupported"
    FLOAT = "float"
    ADJUSTED = "adjusted"
    RULE = "rule"
    SKIPPED = "skipped"
    OUTPUT = "output"
    MODEL = "model"


@dataclass(frozen=True)
class Note:
    """A remark of a pass about one site.

    Attributes:
        kind: the class of the remark.
        site: name of an edge, a node, a rule or a module.
        reason: a sentence.
        step: name of the pass; the pipeline fills it in.
    """

    kind: NoteKind
    site: str
    reason: str
    step: str = ""

    def __iter__(self) -> Iterator[str]:
        """Yields step, site and reason, the tuple that a note was in version 0.1."""
        warnings.warn(
            "a note is an object and no longer a tuple: read note.step, note.site and note.reason",
            DeprecationWarning,
            stacklevel=2,
        )
        return iter((self.step, self.site, self.reason))


@dataclass(frozen=True)
class Comparison:
    """The choice of a pass among several forms of a site, and the error that it saved.

    Attributes:
        site: name of an edge or a node.
        choice: the chosen form, in words.
        measure: the error that was compared, and with what, in words.
        error_ratio: error with the choice over error without; below 1 is an improvement.
        step: name of the pass; the pipeline fills it in.
    """

    site: str
    choice: str
    measure: str
    error_ratio: float
    step: str = ""


@dataclass(frozen=True)
class Refusal:
    """The result of a search for a site where there is none.

    Attributes:
        reason: a sentence or a clause of one.
    """

    reason: str

    def __str__(self) -> str:
        """The reason, as messages quote it."""
        return self.reason


def skipped(site: str, reason: str) -> Note:
    """A note on a site that a pass looked at and did not change.

    Args:
        site: name of an edge or a node.
        reason: a sentence.
    """
    return Note(NoteKind.SKIPPED, site, reason)
