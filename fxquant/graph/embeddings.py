"""Distinguishes embeddings from logits among the outputs ``(B, C)`` of a graph.

Logits are read from a linear or convolution with a bias, whatever elementwise functions, means over
tokens and data movement come after it. An embedding is read from a norm, an activation function, a
residual addition, a division by a norm of itself, or a projection without a bias, as in CLIP. A
projection of normalised features without a bias yields cosines, which are logits.
"""

from __future__ import annotations

from torch import fx
from torch.utils import _pytree as pytree

from fxquant.config.vocabulary import OpKind
from fxquant.graph.blocks import data_nodes
from fxquant.graph.dialect import DATA_MOVEMENT_OPS, PRODUCERS, aten, elementwise_kind, op_kind
from fxquant.graph.meta import EMBEDDINGS
from fxquant.graph.outputs import float_outputs, is_logits
from fxquant.graph.products import Product

_NORMS = ("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm")
_MULTIPLICATIONS = (aten.mul.Tensor, aten.div.Tensor)


def float_output_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes of the float tensors among a graph's outputs, in the order of ``float_outputs``."""
    leaves = pytree.tree_leaves(gm.graph.output_node().args[0])
    nodes = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
    return [node for node in nodes if float_outputs(node.meta.get("val"))]


def has_logits(gm: fx.GraphModule) -> bool:
    """Whether a float output has the shape of logits and is not marked as an embedding."""
    embeddings = EMBEDDINGS.get(gm) or frozenset[int]()
    return any(
        is_logits(node.meta["val"]) and position not in embeddings
        for position, node in enumerate(float_output_nodes(gm))
    )


def embedding_reason(gm: fx.GraphModule, output: fx.Node) -> str | None:
    """The reason why an output ``(B, C)`` is an embedding, None for logits.

    Args:
        gm: canonical graph in stage FLOAT.
        output: node of an output.
    """
    return _Origin(gm).embedding_reason(output)


class _Origin:
    """Follows values back to where they were computed.

    Args:
        gm: canonical graph in stage FLOAT.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm, self._data = gm, set(data_nodes(gm))
        self._known: dict[tuple[fx.Node, bool], str | None] = {}

    def embedding_reason(self, node: fx.Node, *, biased: bool = False) -> str | None:
        """The reason why a value is an embedding; ``biased`` where a constant is added to it."""
        key = node, biased
        if key not in self._known:
            self._known[key] = self._reason(node, biased)
        return self._known[key]

    def _reason(self, node: fx.Node, biased: bool) -> str | None:
        sources = self._sources(node)
        name = PRODUCERS.get(node.target, str(node.target))
        if not sources:
            return f"it is {node.name}, which no product computes"
        if op_kind(node) is not None:
            return self._reason_of_product(node, biased)
        if elementwise_kind(node) is OpKind.ACTIVATION and node.target is not aten.sigmoid.default:
            return f"it is read from {node.name}, an activation function"
        if any(norm in name for norm in _NORMS):
            return f"it is read from {node.name}, a norm"
        if node.target in _MULTIPLICATIONS and len(sources) > 1:
            return f"{node.name} scales it by values of the image, as a norm does"
        if node.target is aten.add.Tensor and len(sources) > 1 and self._is_residual(*sources):
            return f"it is read from {node.name}, a residual addition"
        if node.target is aten.add.Tensor and len(sources) == 1:
            biased = True
        reasons = (self.embedding_reason(source, biased=biased) for source in sources)
        return next((reason for reason in reasons if reason is not None), None)

    def _reason_of_product(self, node: fx.Node, biased: bool) -> str | None:
        product = Product(self._gm, node)
        if biased or (product.has_weight and product.bias_node is not None):
            return None
        if self._is_normalised(product.lhs):
            return None
        return f"it is read from {node.name}, a projection without a bias"

    def _is_normalised(self, node: fx.Node) -> bool:
        """Whether values are divided by a norm of theirs, whatever constants multiply them then."""
        sources = self._sources(node)
        if node.target in _MULTIPLICATIONS and len(sources) > 1:
            return True
        transparent = node.target in DATA_MOVEMENT_OPS or node.target in _MULTIPLICATIONS
        return transparent and len(sources) == 1 and self._is_normalised(sources[0])

    def _is_residual(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether one addend is computed from the other one."""
        return one is other or one in self._behind(other) or other in self._behind(one)

    def _behind(self, node: fx.Node) -> set[fx.Node]:
        """The nodes that a value is computed from."""
        seen, pending = set[fx.Node](), [node]
        while pending:
            for source in pending.pop().all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    pending.append(source)
        return seen

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that a node reads and that depend on the image."""
        return [source for source in node.all_input_nodes if source in self._data]
