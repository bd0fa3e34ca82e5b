"""The contract of a pass, and the runner that checks it.

A pass is a frozen dataclass around a free function. Its fields are its options, ``requires`` the
stage it takes, ``ensures`` the stage it leaves. It answers with the number of sites it changed
and, for each site it looked at and left alone, a sentence saying why.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import fx

from fxquant.config.vocabulary import Stage
from fxquant.errors import FxQuantError, PassError
from fxquant.graph.meta import STAGE
from fxquant.graph.nodes import stage
from fxquant.graph.verify import verify


@dataclass(frozen=True)
class Skip:
    """A site that a pass left alone.

    Attributes:
        site: edge or node name.
        reason: a sentence.
    """

    site: str
    reason: str


@dataclass(frozen=True)
class Gain:
    """What a pass chose at a site among several things, and what that gained.

    Attributes:
        site: edge or node name.
        choice: in words.
        measure: what the ratio is of, and compared to what, in words.
        ratio: with the choice over without.
    """

    site: str
    choice: str
    measure: str
    ratio: float


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        changed: number of sites rewritten or annotated.
        skips: the sites it refused, with reasons.
        gains: what its choices gained, of a pass that compares.
    """

    changed: int
    skips: tuple[Skip, ...] = ()
    gains: tuple[Gain, ...] = ()


class Pass(Protocol):
    """A step of the compiler; implemented by frozen dataclasses."""

    requires: ClassVar[Stage]
    ensures: ClassVar[Stage]

    def run(self, gm: fx.GraphModule) -> PassResult:
        """Edits ``gm`` in place and says what it did."""


def run_passes(gm: fx.GraphModule, passes: Iterable[Pass]) -> dict[str, PassResult]:
    """Runs passes in order; after each one lints, recompiles and verifies the graph.

    Args:
        gm: edited in place.
        passes: in order; two of one class in one call are not told apart in the result.

    Returns:
        Result of each pass, by class name.

    Raises:
        PassError: a pass requires another stage than the graph is in, or fails.
        VerifyError: a pass broke the graph.
    """
    results: dict[str, PassResult] = {}
    for item in passes:
        name = type(item).__name__
        if stage(gm) is not item.requires:
            raise PassError(
                f"{name} takes a graph in stage {item.requires.name}, got {stage(gm).name}; "
                f"already run: {', '.join(results) or 'none'}"
            )
        try:
            results[name] = item.run(gm)
            STAGE.set(gm, item.ensures)
            gm.graph.lint()
        except FxQuantError:
            raise
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise PassError(
                f"{name} failed ({type(error).__name__}: {error}); already run before it: "
                f"{', '.join(results) or 'none'}. Please report this with the model's definition"
            ) from error
        gm.recompile()
        verify(gm)
    return results
