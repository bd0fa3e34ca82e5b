"""How long the preset ``best`` may take."""

from __future__ import annotations

from enum import StrEnum


class Effort(StrEnum):
    """How long a compilation may take.

    ``seconds``: scales of small networks are trained on what is made of a few images, others not at
    all; ``minutes``: weights as well, of all but the largest, for longer, on hundreds of images;
    ``hours``: of all.
    """

    SECONDS = "seconds"
    MINUTES = "minutes"
    HOURS = "hours"
