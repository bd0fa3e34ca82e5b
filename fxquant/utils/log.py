"""The logger ``fxquant``: silent unless a program asks for its records.

``logging.basicConfig(level=logging.INFO)`` shows them, as ``fxquant --verbose`` does. INFO tells
what took how long and which files were used, DEBUG each single step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

LOGGER = logging.getLogger("fxquant")
LOGGER.addHandler(logging.NullHandler())


@contextmanager
def logged(step: str) -> Iterator[None]:
    """Logs that a step begins (DEBUG) and how many seconds it took (INFO).

    Args:
        step: name of a phase, pass or export.
    """
    LOGGER.debug("%s begins", step)
    start = time.perf_counter()
    yield
    LOGGER.info("%s took %.2f s", step, time.perf_counter() - start)


def show_log() -> None:
    """Prints records of level INFO and above on stderr; for the command line."""
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    LOGGER.setLevel(logging.INFO)
