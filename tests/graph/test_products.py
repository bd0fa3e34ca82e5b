"""The view of a product, and modules put on edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from fxquant.config.spec import TensorSpec
from fxquant.config.vocabulary import Arg, OpKind
from fxquant.errors import PassError
from fxquant.graph.capture import capture
from fxquant.graph.dialect import op_kind
from fxquant.graph.edges import Edge
from fxquant.graph.products import Product, weighted_products
from fxquant.graph.rewrite import insert_on_edge
from fxquant.quantizers import UniformQuantizer
from tests.helpers.refusals import refused


class Net(nn.Module):
    """A convolution with a bias, a linear without, and a matmul of what they yield."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2)
        self.fc = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).mT
        return self.fc(tokens) @ tokens.mT


@pytest.fixture
def gm() -> fx.GraphModule:
    return capture(Net().eval(), torch.randn(2, 3, 5, 5))


def quantizer() -> UniformQuantizer:
    scale, zero_point = torch.tensor(0.5), torch.tensor(0.0)
    return UniformQuantizer(scale, zero_point, bits=8, signed=True, axis=None)


def test_only_linears_and_convolutions_have_weights(gm: fx.GraphModule) -> None:
    assert [product.kind for product in weighted_products(gm)] == [OpKind.CONV, OpKind.LINEAR]
    (matmul,) = (Product(gm, node) for node in gm.graph.nodes if op_kind(node) is OpKind.MATMUL)
    assert not matmul.has_weight and not matmul.has_constant_weight and matmul.bias is None
    assert (matmul.lhs, matmul.rhs) == matmul.node.args


def test_weight_and_bias_are_those_of_the_model(gm: fx.GraphModule) -> None:
    conv, linear = weighted_products(gm)
    torch.testing.assert_close(conv.weight, gm.get_parameter("conv.weight"))
    torch.testing.assert_close(conv.bias, gm.get_parameter("conv.bias"))
    assert conv.has_constant_weight and not conv.has_computed_bias
    assert linear.bias is None and linear.bias_node is None and not linear.has_computed_bias


def test_a_computed_weight_has_no_tensor() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, 2 * self.weight, 2 * self.bias)

    graph = capture(Scaled(3, 3).eval(), torch.randn(3, 3))
    (linear,) = weighted_products(graph)
    assert not linear.has_constant_weight and linear.has_computed_bias and linear.bias is None
    with refused(PassError, "the weight of linear is computed at run time", edge="linear"):
        _ = linear.weight


def test_quantizers_are_looked_through(gm: fx.GraphModule) -> None:
    (_, linear) = weighted_products(gm)
    source, weight, modules = linear.input, linear.weight_node, (quantizer(), quantizer())
    assert linear.input_quantizer is None and linear.weight_quantizer is None
    insert_on_edge(gm, Edge(linear.node, Arg.INPUT), "quant.x", modules[0])
    insert_on_edge(gm, Edge(linear.node, Arg.WEIGHT), "quant.w", modules[1])
    assert (linear.input_quantizer, linear.weight_quantizer) == modules
    assert linear.weight_node is weight and linear.input.args == (source,)
    assert linear.lhs_quantizer is linear.input_quantizer


def test_an_inserted_module_feeds_its_edge_alone(gm: fx.GraphModule) -> None:
    (_, linear) = weighted_products(gm)
    source = linear.input
    others = set(source.users) - {linear.node}
    call = insert_on_edge(gm, Edge(linear.node, Arg.INPUT), "quant.x", quantizer())
    gm.graph.lint()
    assert linear.input is call and set(source.users) == others | {call} and others
    assert call.meta["val"] is source.meta["val"]


def test_annotating_leaves_copies_of_the_graph_alone(gm: fx.GraphModule) -> None:
    (conv, _) = weighted_products(gm)
    edge = Edge(conv.node, Arg.INPUT)
    edge.annotate(TensorSpec(bits=8))
    copied = fx.GraphModule(gm, fx.Graph())
    nodes: dict[fx.Node, fx.Node] = {}
    copied.graph.graph_copy(gm.graph, nodes)
    edge.annotate(TensorSpec(bits=4))
    Edge(conv.node, Arg.WEIGHT).annotate(TensorSpec(bits=6))
    assert edge.spec == TensorSpec(bits=4)
    assert Edge(nodes[conv.node], Arg.INPUT).spec == TensorSpec(bits=8)
    assert Edge(nodes[conv.node], Arg.WEIGHT).spec is None
