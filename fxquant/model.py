"""Old place of :mod:`fxquant.compiled.model`, which models pickled by version 0.1 name."""

from fxquant.compiled.model import CompiledModel, _unpickled, load

__all__ = ["CompiledModel", "_unpickled", "load"]
