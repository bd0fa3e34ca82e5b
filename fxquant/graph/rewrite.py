"""Edits of a graph that keep the shapes of its values."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from fxquant.config.vocabulary import Arg
from fxquant.errors import PassError
from fxquant.graph.edges import Edge
from fxquant.graph.meta import origin
from fxquant.graph.nodes import get_parameter
from fxquant.graph.products import Product


def add_constant(gm: fx.GraphModule, value: Tensor, name: str, like: fx.Node) -> fx.Node:
    """Registers ``value`` as a buffer of the graph and returns a node that reads it.

    Args:
        gm: the graph; the new node goes to the current insertion point.
        value: the tensor; detached, made contiguous.
        name: name of the buffer, numbered where the graph has one of that name.
        like: the node whose module path and source line the new one gets.
    """
    stem = re.sub(r"\W", "_", name)
    unique, i = stem, 0
    while hasattr(gm, unique):
        i += 1
        unique = f"{stem}_{i}"
    gm.register_buffer(unique, value.detach().contiguous())
    node = gm.graph.get_attr(unique)
    node.meta.update(origin(like))
    node.meta["val"] = _fake_mode(like).from_tensor(get_parameter(gm, node), static_shapes=True)
    return node


def replace_constant(
    gm: fx.GraphModule, reader: fx.Node, old: fx.Node, value: Tensor, name: str
) -> None:
    """Replaces a constant for one of its readers; other readers keep the old one.

    Args:
        gm: the graph.
        reader: a node that reads ``old``.
        old: a ``get_attr`` node; erased where no other node reads it.
        value: the new constant.
        name: name of the new constant, numbered where the graph has one of that name.
    """
    with gm.graph.inserting_before(reader):
        new = add_constant(gm, value, name, like=reader)
    reader.replace_input_with(old, new)
    if not old.users:
        gm.graph.erase_node(old)


def set_bias(gm: fx.GraphModule, node: fx.Node, value: Tensor) -> None:
    """Sets the bias of a linear or convolution; other readers of the old bias keep it.

    Args:
        gm: the graph.
        node: the product, with or without a bias.
        value: the bias, ``(N,)``.
    """
    old = Product(gm, node).bias_node
    with gm.graph.inserting_before(node):
        new = add_constant(gm, value, f"{node.name}_bias", like=node)
    node.args = (*node.args[:2], new, *node.args[3:])
    if old is not None and old.op == "get_attr" and not old.users:
        gm.graph.erase_node(old)


def insert_on_edge(gm: fx.GraphModule, edge: Edge, name: str, module: nn.Module) -> fx.Node:
    """Puts a module on an edge: the operation reads the module's output, other readers do not.

    Args:
        gm: the graph.
        edge: the edge; the call of the module keeps the ``val`` of the edge's source.
        name: where the module is registered, such as ``quant.<edge name>``.
        module: an observer or quantizer.

    Returns:
        The call: next to the parameter at a weight, which products may share; else right before
        the operation.
    """
    gm.add_submodule(name, module)
    source = edge.source
    at_weight = edge.arg is Arg.WEIGHT
    with gm.graph.inserting_after(source) if at_weight else gm.graph.inserting_before(edge.node):
        call = gm.graph.call_module(name, (source,))
    call.meta["val"] = source.meta.get("val")
    edge.replace_source(call)
    return call


def emit(
    gm: fx.GraphModule, target: Callable[..., Any], *args: Any, like: fx.Node, **kwargs: Any
) -> fx.Node:
    """Adds a ``call_function`` node at the insertion point, its ``val`` computed on fake tensors.

    Args:
        gm: the graph.
        target: an aten operator.
        *args: arguments of the operator: nodes or values.
        like: the node whose module path and source line the new one gets.
        **kwargs: keyword arguments of the operator.
    """
    node = gm.graph.call_function(target, args, kwargs)
    node.meta.update(origin(like))
    fake_args, fake_kwargs = fx.map_arg((args, kwargs), lambda n: fake_value(gm, n))
    # Keeps batch sizes symbolic where torch 2.11's composite kernels would ask for numbers.
    with _fake_mode(like), enable_python_dispatcher():
        node.meta["val"] = target(*fake_args, **fake_kwargs)
    return node


def fake_value(gm: fx.GraphModule, node: fx.Node) -> Any:
    """The fake tensor (or symbolic integer) that a node yields."""
    if "val" not in node.meta and node.op == "get_attr":
        mode = _fake_mode(next(iter(node.users)))
        node.meta["val"] = mode.from_tensor(get_parameter(gm, node), static_shapes=True)
    return node.meta["val"]


@torch.no_grad()
def propagate_shapes(gm: fx.GraphModule, image_shape: tuple[int, ...]) -> None:
    """Computes ``val`` of every node, on fake tensors with a symbolic batch dimension.

    Args:
        gm: a graph that was rebuilt from a file, and has no shapes yet.
        image_shape: shape of one input, without the batch.
    """
    from torch.fx.experimental.symbolic_shapes import (  # imports sympy
        DimDynamic,
        ShapeEnv,
        StatelessSymbolicContext,
    )

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    sizes = [DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * len(image_shape)]
    images = mode.from_tensor(
        torch.zeros(3, *image_shape),
        symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes),
    )
    with enable_python_dispatcher():
        FakeTensorProp(gm, mode).propagate_dont_convert_inputs(images)


def _fake_mode(node: fx.Node) -> FakeTensorMode:
    """The fake mode that the graph was captured under, from the first node with a fake tensor."""
    for candidate in (node, *node.graph.nodes):
        value = candidate.meta.get("val")
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, FakeTensor):
                return item.fake_mode
    raise PassError("the graph carries no shapes; capture it with fxquant.graph.capture.capture")
