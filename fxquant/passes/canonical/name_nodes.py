"""Names quantizable operations after their modules.

Before: ``linear_3 = linear(…)`` made in ``blocks.0.attn.proj``
After:  ``blocks_0_attn_proj = linear(…)``

Edge names, and with them policies, plans and reports, derive from these. Operations that are not
a module of their own add their name: ``blocks_0_attn_matmul``, ``blocks_0_add``; further ones are
numbered.
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

# Operations that are mostly modules of their own.
_MODULES = (OpKind.LINEAR, OpKind.CONV, OpKind.LAYER_NORM, OpKind.RMS_NORM)


@dataclass(frozen=True)
class NameNodes:
    """See the module's text."""

    requires: ClassVar[Stage] = Stage.FLOAT
    ensures: ClassVar[Stage] = Stage.FLOAT

    def run(self, gm: fx.GraphModule) -> PassResult:
        """Renames, and stores the path in ``meta["path"]``, which survives saving.

        Raises:
            NothingToQuantizeError: the graph has no quantizable operation.
        """
        wanted: list[tuple[fx.Node, str]] = []
        for node in gm.graph.nodes:
            kind = op_kind(node) or elementwise_kind(node)
            if kind is None:
                continue
            path = module_path(node)
            MODULE_PATH.set(node, path)
            stem = re.sub(r"\W", "_", path)
            if kind not in _MODULES or not path:
                name = node.target.__name__.split(".")[0] if kind is OpKind.ACTIVATION else kind
                stem = stem if stem.endswith(str(name)) else f"{stem}_{name}".strip("_")
            wanted.append((node, stem))
        if not any(op_kind(node) is not None for node, _ in wanted):
            raise NothingToQuantizeError(
                "the model has no linear, convolution or matrix product, so there is nothing to "
                "quantize; was the right module passed?"
            )
        changed = sum(_rename(node, stem) for node, stem in wanted)
        return PassResult(changed)


def _rename(node: fx.Node, stem: str) -> bool:
    if re.fullmatch(rf"_?{re.escape(stem)}(_\d+)?", node.name):
        return False
    before = node.name
    node._rename(stem)
    return node.name != before
