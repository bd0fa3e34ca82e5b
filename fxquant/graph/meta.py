"""Keys that fxquant keeps in ``meta`` of a graph and of its nodes: one typed constant each.

Keys that torch owns (``val``, ``nn_module_stack``, ``stack_trace``) are named where they are used.
All keys of fxquant but ``path`` and ``stage`` are lost when a compiled model is saved; a loaded
graph gets its annotations from the file's specs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from torch import fx

from fxquant.config.spec import TensorSpec
from fxquant.config.vocabulary import Arg, Stage

T = TypeVar("T")


@dataclass(frozen=True)
class MetaKey(Generic[T]):
    """A key in ``meta``, with the type of its value.

    Attributes:
        name: the key itself, as in ``gm.meta["stage"]``.
    """

    name: str

    def get(self, owner: fx.Node | fx.GraphModule) -> T | None:
        """The value, None where ``owner`` has none."""
        return cast("T | None", owner.meta.get(self.name))

    def set(self, owner: fx.Node | fx.GraphModule, value: T) -> None:
        """Sets the value."""
        owner.meta[self.name] = value

    def remove(self, owner: fx.Node | fx.GraphModule) -> None:
        """Removes the value, if there is one."""
        owner.meta.pop(self.name, None)


# Keys of a graph.

STAGE: MetaKey[Stage] = MetaKey("stage")
"""Stage of the graph. Written by capture, by ``run_passes`` after each pass and by loading; removed
by the integer backend; read with ``graph.nodes.stage``."""

HOOKED_MODULES: MetaKey[tuple[str, ...]] = MetaKey("hooked")
"""Paths of modules whose hooks capture left out. Written by capture, read by ``canonicalize``,
which puts them in the report."""

SMOOTHED: MetaKey[bool] = MetaKey("smoothed")
"""Whether ``SmoothWithBias`` has run, which reads and writes it: a second run changes nothing."""

ROTATED: MetaKey[frozenset[str]] = MetaKey("rotated")
"""Class names of the passes that have rotated the graph. Read and written by
``passes.base.claim_rotation``: a second run of a rotation changes nothing."""

RECONSTRUCTED: MetaKey[bool] = MetaKey("reconstructed")
"""Whether ``Reconstruct`` has run, which reads and writes it: a second run changes nothing."""

EMBEDDINGS: MetaKey[frozenset[int]] = MetaKey("embeddings")
"""Positions, among the float outputs, of outputs ``(B, C)`` that are embeddings and no logits.
Written by ``MarkEmbeddings``; read by the losses of outputs and by ``fingerprint``."""

CODE_NAMES: MetaKey[Mapping[str, str]] = MetaKey("codes")
"""Name of each quantizer of the simulation -> name of what yields its codes. Written by the integer
backend into the lowered graph, read by capture, which refuses to quantize such a graph again, and
by whoever compares codes."""

FLOAT_BECAUSE: MetaKey[str] = MetaKey("float_because")
"""Reason why a lowered graph is not integer-only, empty where it is. Written by the integer
backend, read by users."""

# Keys of a node.

QUANT_SPECS: MetaKey[Mapping[Arg, TensorSpec]] = MetaKey("quant")
"""Specs of the annotated arguments of an operation. Written with ``Edge.annotate``, which replaces
the mapping and never changes it in place (copies of a graph share it); read with ``Edge.spec``."""

KEPT_FLOAT: MetaKey[str] = MetaKey("kept_float")
"""Reason why no rule quantizes an operation. Written by ``RotateHidden``, read by
``AssignSpecs``."""

PINNED_ARGS: MetaKey[frozenset[Arg]] = MetaKey("pinned")
"""Arguments whose width no search may change. Written by ``AssignSpecs`` from pinned rules, read by
the search of widths and by ``fingerprint``."""

PACKED_WEIGHT: MetaKey[str] = MetaKey("packed")
"""Name of the parameter that a product's weight was cut from. Written by ``SplitProjections``, read
by the search of widths, which gives all products cut from one weight one width, and by
``fingerprint``."""

MODULE_PATH: MetaKey[str] = MetaKey("path")
"""Path of the user's module that a node comes from. Written by ``NameNodes`` and by loading a
graph, read with ``graph.nodes.module_path`` and by saving."""

BIAS_CORRECTED: MetaKey[bool] = MetaKey("bias_corrected")
"""Whether the bias of a product takes out the mean error that its rounded weight makes. Written by
``CorrectBias``; read by it and by ``AttachLowRank``."""

LOW_RANK_DECIDED: MetaKey[bool] = MetaKey("low_rank")
"""Whether ``AttachLowRank`` has decided on a linear, or made it: it reads and writes the key."""

COMPENSATED: MetaKey[bool] = MetaKey("compensated")
"""Whether ``Compensate`` has fitted a product's weight: it reads and writes the key."""

KEYS: tuple[MetaKey[Any], ...] = (
    STAGE,
    HOOKED_MODULES,
    SMOOTHED,
    ROTATED,
    RECONSTRUCTED,
    EMBEDDINGS,
    CODE_NAMES,
    FLOAT_BECAUSE,
    QUANT_SPECS,
    KEPT_FLOAT,
    PINNED_ARGS,
    PACKED_WEIGHT,
    MODULE_PATH,
    BIAS_CORRECTED,
    LOW_RANK_DECIDED,
    COMPENSATED,
)


def origin(node: fx.Node) -> dict[str, Any]:
    """The entries of a node's ``meta`` that tell where in the user's model it comes from.

    A node that takes the place of another one, or is added next to it, gets these entries.
    """
    keys = ("nn_module_stack", "stack_trace", MODULE_PATH.name)
    return {key: node.meta[key] for key in keys if key in node.meta}
