"""How passes add to a graph, the shapes of its values kept."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from fxquant.errors import PassError
from fxquant.graph.nodes import get_parameter


def add_constant(gm: fx.GraphModule, value: Tensor, name: str, like: fx.Node) -> fx.Node:
    """Registers ``value`` as a buffer of the graph and returns a node that reads it.

    Args:
        gm: the graph; the new node goes to the current insertion point.
        value: the tensor; detached, made contiguous.
        name: wanted name; made unique.
        like: the node whose module path and source line the new one takes.
    """
    stem = re.sub(r"\W", "_", name)
    unique, i = stem, 0
    while hasattr(gm, unique):
        i += 1
        unique = f"{stem}_{i}"
    gm.register_buffer(unique, value.detach().contiguous())
    node = gm.graph.get_attr(unique)
    _copy_origin(node, like)
    node.meta["val"] = _fake_mode(like).from_tensor(get_parameter(gm, node), static_shapes=True)
    return node


def replace_constant(
    gm: fx.GraphModule, reader: fx.Node, old: fx.Node, value: Tensor, name: str
) -> None:
    """Gives one reader of a constant another one; further readers keep theirs.

    Args:
        gm: the graph.
        reader: a node that takes ``old``.
        old: a ``get_attr`` node; erased where nothing else reads it.
        value: the new constant.
        name: wanted name of it; made unique.
    """
    with gm.graph.inserting_before(reader):
        new = add_constant(gm, value, name, like=reader)
    reader.replace_input_with(old, new)
    if not old.users:
        gm.graph.erase_node(old)


def set_bias(gm: fx.GraphModule, node: fx.Node, value: Tensor) -> None:
    """Gives a linear or convolution a constant bias; further readers of the old one keep theirs.

    Args:
        gm: the graph.
        node: the product; one without a bias gets one.
        value: the bias, ``(N,)``.
    """
    old = node.args[2] if len(node.args) > 2 else None
    with gm.graph.inserting_before(node):
        new = add_constant(gm, value, f"{node.name}_bias", like=node)
    node.args = (*node.args[:2], new, *node.args[3:])
    if isinstance(old, fx.Node) and old.op == "get_attr" and not old.users:
        gm.graph.erase_node(old)


def emit(
    gm: fx.GraphModule, target: Callable[..., Any], *args: Any, like: fx.Node, **kwargs: Any
) -> fx.Node:
    """Adds a ``call_function`` node at the insertion point, its ``val`` computed on fake tensors.

    Args:
        gm: the graph.
        target: an aten operator.
        *args: its arguments; nodes or values.
        like: the node whose module path and source line the new one takes.
        **kwargs: its keyword arguments.
    """
    node = gm.graph.call_function(target, args, kwargs)
    _copy_origin(node, like)
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
    """Gives every node its ``val`` anew, on fake tensors with a symbolic batch dimension.

    Args:
        gm: a graph that was rebuilt from a file.
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


def _copy_origin(node: fx.Node, like: fx.Node) -> None:
    for key in ("nn_module_stack", "stack_trace", "path"):
        if key in like.meta:
            node.meta[key] = like.meta[key]


def _fake_mode(node: fx.Node) -> FakeTensorMode:
    """The fake mode that the graph was captured under, found from any node of it."""
    for candidate in (node, *node.graph.nodes):
        value = candidate.meta.get("val")
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, FakeTensor):
                return item.fake_mode
    raise PassError("the graph carries no shapes; capture it with fxquant.graph.capture.capture")
