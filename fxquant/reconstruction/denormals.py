"""Denormal numbers, with which CPUs are many times slower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Numbers below float32's normal range count as zero on this thread meanwhile.

    The means that Adam keeps of a parameter without gradient shrink until they are such numbers.
    """
    before = float(torch.tensor(torch.finfo(torch.float32).tiny) / 2) == 0  # torch does not tell
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
