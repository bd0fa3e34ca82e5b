"""Compiled models that tests of several files read, made once in each process."""

from __future__ import annotations

from functools import cache

import fxquant
from fxquant.testing import Block, seeded, tokens


@cache
def block() -> fxquant.CompiledModel:
    """A seeded block compiled by the default policy on four inputs; not to be changed."""
    return fxquant.compile(seeded(Block()), [tokens(4)])
