"""A view of a product (linear, convolution or matmul) by what it multiplies and adds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from fxquant.config.vocabulary import OpKind
from fxquant.errors import PassError
from fxquant.graph.dialect import op_kind
from fxquant.graph.nodes import constant, get_parameter, operand, submodule
from fxquant.quantizers import Quantizer


@dataclass(frozen=True)
class Product:
    """A product of a graph. The view holds no copies: it shows the graph as it is when asked.

    Attributes:
        gm: the graph.
        node: a linear, convolution or matmul of the graph.
    """

    gm: fx.GraphModule
    node: fx.Node

    @property
    def kind(self) -> OpKind:
        """Kind of the product."""
        kind = op_kind(self.node)
        assert kind is not None
        return kind

    @property
    def lhs(self) -> fx.Node:
        """Node that the left operand is read from, a call of an observer or quantizer included."""
        return operand(self.node, 0)

    @property
    def rhs(self) -> fx.Node:
        """Node that the right operand is read from, a call of an observer or quantizer included."""
        return operand(self.node, 1)

    @property
    def lhs_quantizer(self) -> Quantizer | None:
        """Quantizer of the left operand, None where it is float or observed."""
        return self._quantizer(self.lhs)

    @property
    def rhs_quantizer(self) -> Quantizer | None:
        """Quantizer of the right operand, None where it is float or observed."""
        return self._quantizer(self.rhs)

    @property
    def has_weight(self) -> bool:
        """Whether the right operand is a weight: at linears and convolutions."""
        return self.kind in (OpKind.LINEAR, OpKind.CONV)

    @property
    def input(self) -> fx.Node:
        """Node that a linear or convolution reads its input from, the ``lhs``."""
        assert self.has_weight
        return self.lhs

    @property
    def input_quantizer(self) -> Quantizer | None:
        """Quantizer of the input of a linear or convolution, None where it is float or observed."""
        assert self.has_weight
        return self.lhs_quantizer

    @property
    def weight_node(self) -> fx.Node:
        """Node that yields the float weight of a linear or convolution, before its quantizer."""
        assert self.has_weight
        return operand(self.rhs, 0) if self.rhs.op == "call_module" else self.rhs

    @property
    def weight_quantizer(self) -> Quantizer | None:
        """Quantizer of the weight of a linear or convolution, None where it is float."""
        assert self.has_weight
        return self.rhs_quantizer

    @property
    def has_constant_weight(self) -> bool:
        """Whether the product has a weight that is a parameter or buffer of the graph."""
        return self.has_weight and self.weight_node.op == "get_attr"

    @property
    def weight(self) -> Tensor:
        """Float weight, ``(out, in)`` or ``(out, in / groups, *kernel)``.

        Raises:
            PassError: the weight is computed at run time (``has_constant_weight``).
        """
        if not self.has_constant_weight:
            raise PassError(
                f"the weight of {self.node.name} is computed at run time", edge=self.node.name
            )
        return get_parameter(self.gm, self.weight_node)

    @property
    def bias_node(self) -> fx.Node | None:
        """Node that the bias of a linear or convolution is read from, None without a bias."""
        bias = self.node.args[2] if self.has_weight and len(self.node.args) > 2 else None
        assert bias is None or isinstance(bias, fx.Node)
        return bias

    @property
    def bias(self) -> Tensor | None:
        """Constant bias, ``(out,)``; None without a bias and where it is computed at run time."""
        return constant(self.gm, self.bias_node)

    @property
    def has_computed_bias(self) -> bool:
        """Whether the bias is computed at run time."""
        return self.bias_node is not None and self.bias_node.op != "get_attr"

    def _quantizer(self, source: fx.Node) -> Quantizer | None:
        module = submodule(self.gm, source)
        return module if isinstance(module, Quantizer) else None


def weighted_products(gm: fx.GraphModule) -> Iterator[Product]:
    """The linears and convolutions of a graph in order; the graph may be edited on the way."""
    for node in list(gm.graph.nodes):
        if op_kind(node) in (OpKind.LINEAR, OpKind.CONV):
            yield Product(gm, node)
