"""Effort of the preset ``best``."""

from __future__ import annotations

from enum import StrEnum


class Effort(StrEnum):
    """Time that a compilation may take.

    ``seconds``: scales of small classifiers are trained on images augmented from a few, larger
    ones are not trained; of networks without classes the weights are trained in a few steps;
    ``minutes``: weights are trained, except in the largest networks, with more steps on hundreds of
    images; ``hours``: weights of all networks are trained.
    """

    SECONDS = "seconds"
    MINUTES = "minutes"
    HOURS = "hours"
