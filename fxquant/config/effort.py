"""Effort of the preset ``best``."""

from __future__ import annotations

from enum import StrEnum


class Effort(StrEnum):
    """Time that a compilation may take.

    ``seconds``: scales of small networks are trained on images augmented from a few, larger
    networks are not trained; ``minutes``: weights are trained too, except in the largest networks,
    with more steps on hundreds of images; ``hours``: weights of all networks are trained.
    """

    SECONDS = "seconds"
    MINUTES = "minutes"
    HOURS = "hours"
