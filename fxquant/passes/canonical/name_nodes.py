"""Names quantizable operations after their modules.

Before: ``linear_3 = linear(…)`` made in ``blocks.0.attn.proj``
After:  ``blocks_0_attn_proj = linear(…)``

Names of edges, in policies, plans and reports, derive from these names. An operation that is not
a module itself has its own name behind its module's: ``blocks_0_attn_matmul``, ``blocks_0_add``.
Nodes of one name are numbered.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxquant.config.vocabulary import OpKind, Stage
from fxquant.errors import NothingToQuantizeError
from fxquant.graph.dialect import elementwise_kind, op_kind
from fxquant.graph.meta import MODULE_PATH
from fxquant.graph.nodes import module_path
from fxquant.passes.base import PassResult

# Kinds of operations that mostly are modules themselves.
_MODULE_KINDS = (OpKind.LINEAR, OpKind.CONV, OpKind.LAYER_NORM, OpKind.RMS_NORM)


@dataclass(frozen=True)
class NameNodes:
    """Names quantizable operations after their modules."""

    requires: ClassVar[Stage] = Stage.FLOAT
    ensures: ClassVar[Stage] = Stage.FLOAT

    def run(self, gm: fx.GraphModule) -> PassResult:
        """Renames, and stores the path in ``meta["path"]``, which survives saving.

        Raises:
            NothingToQuantizeError: the graph has no quantizable operation.
        """
        stems: list[tuple[fx.Node, str]] = []
        for node in gm.graph.nodes:
            kind = op_kind(node) or elementwise_kind(node)
            if kind is None:
                continue
            path = module_path(node)
            MODULE_PATH.set(node, path)
            stem = re.sub(r"\W", "_", path)
            if kind not in _MODULE_KINDS or not path:
                name = node.target.__name__.split(".")[0] if kind is OpKind.ACTIVATION else kind
                stem = stem if stem.endswith(str(name)) else f"{stem}_{name}".strip("_")
            stems.append((node, stem))
        if not any(op_kind(node) is not None for node, _ in stems):
            raise NothingToQuantizeError(
                "the model has no linear, convolution or matrix product, so there is nothing to "
                "quantize; was the right module passed?"
            )
        changed = sum(_rename(node, stem) for node, stem in stems)
        return PassResult(changed)


def _rename(node: fx.Node, stem: str) -> bool:
    """Names a node ``stem``, numbered where the name is taken; False where it has it already."""
    if re.fullmatch(rf"_?{re.escape(stem)}(_\d+)?", node.name):
        return False
    old_name = node.name
    node._rename(stem)
    return node.name != old_name
