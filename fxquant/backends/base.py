"""Protocol of the backends that run in this process, and the table of these backends.

Each backend has a table of lowerings with a row for each class of quantizers that it runs:
``LOWERINGS: dict[type[Quantizer], ...]``. :func:`lowering_of` looks a quantizer up in that table.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, cast

from torch import fx, nn

from fxquant.errors import LoweringError
from fxquant.graph.edges import Edge
from fxquant.quantizers import FAMILIES, Quantizer, entry_for
from fxquant.utils.suggest import did_you_mean

Lowering = TypeVar("Lowering")


class Backend(Protocol):
    """Lowers a graph to a module; keyword-only parameters are the flags of the backend."""

    def __call__(self, gm: fx.GraphModule, /, **flags: Any) -> nn.Module:
        """Makes the module that runs the graph.

        Args:
            gm: the graph in stage FROZEN; not changed.
            **flags: flags of the backend.

        Raises:
            LoweringError: the backend cannot express the graph.
        """


# Name -> module, which is imported on use, and the name of the backend in that module. ONNX files
# run in another process, so that CompiledModel.export_onnx writes them.
BACKENDS = {
    "integer": ("fxquant.backends.integer", "lower_to_integer"),
    "inductor": ("fxquant.backends.inductor", "lower_to_inductor"),
}


def load_backend(name: str, flags: Mapping[str, Any]) -> Backend:
    """Imports a backend and checks the names of flags.

    Args:
        name: a key of ``BACKENDS``.
        flags: flags that the backend is to be called with.

    Raises:
        LoweringError: no backend has that name, or the backend does not have a flag.
    """
    if name not in BACKENDS:
        raise LoweringError(
            f"no backend {name!r}{did_you_mean(str(name), BACKENDS)}; there are "
            f"{', '.join(BACKENDS)}, and export_onnx() for onnxruntime",
            got=name,
            expected=tuple(BACKENDS),
        )
    for flag in flags:
        owners = [other for other in BACKENDS if flag in _flags(_load(other))]
        if name not in owners:
            verb = f"belongs to backend {' and '.join(owners)}" if owners else "is unknown"
            raise LoweringError(
                f"backend {name!r} has no flag {flag!r}, which {verb}"
                f"{did_you_mean(flag, _flags(_load(name)))}; backend {name} has "
                f"{', '.join(_flags(_load(name))) or 'none'}",
                got=flag,
                expected=tuple(_flags(_load(name))),
            )
    return _load(name)


def _load(name: str) -> Backend:
    module, function = BACKENDS[name]
    return cast(Backend, getattr(importlib.import_module(module), function))


def _flags(backend: Backend) -> list[str]:
    parameters = inspect.signature(backend).parameters.values()
    return [item.name for item in parameters if item.kind is item.KEYWORD_ONLY]


def lowering_of(
    lowerings: Mapping[type[Quantizer], Lowering], quantizer: Quantizer, edge: Edge, backend: str
) -> Lowering:
    """Looks a quantizer up in a backend's table of lowerings.

    Args:
        lowerings: the table.
        quantizer: the quantizer on the edge.
        edge: edge that the error names.
        backend: backend that the error names.

    Raises:
        LoweringError: the backend has no form of the quantizer.
    """
    lowering = entry_for(lowerings, quantizer)
    if lowering is None:
        schemes = [
            name
            for name, family in FAMILIES.items()
            if not lowerings.keys().isdisjoint(family.quantizer.__mro__)
        ]
        scheme = "" if edge.spec is None else f" (scheme {edge.spec.scheme})"
        raise LoweringError(
            f"{edge.name} ({edge.path}): {backend} has no form of {type(quantizer).__name__}"
            f"{scheme}; it has one of schemes {', '.join(schemes)}: give the edge one of these, "
            "keep it float (spec: null), or lower the model to another backend",
            edge=edge.name,
            got=type(quantizer).__name__,
        )
    return lowering
