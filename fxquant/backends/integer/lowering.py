"""Rewrites a FROZEN graph so that its products run on integer codes.

Before: ``linear(q_x(x), q_W(W), b)``
After:  ``int_linear(to_codes(x), W_codes)``, ``W_codes`` and the bias integer buffers

Codes of a twin quantizer are its code words; a product takes them apart (:mod:`twin`).

A product whose operands are not both quantized stays float, on dequantized codes where it has
any. Equal quantizers of one value become one, so that a value is quantized once.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.backends.integer.convolve import Geometry
from fxquant.backends.integer.modules import (
    FromCodes,
    IntConv,
    IntLinear,
    IntMatmul,
    Side,
    ToCodes,
    bias_codes,
    storage_dtype,
)
from fxquant.backends.integer.twin import TwinFromCodes, TwinSide, TwinToCodes
from fxquant.errors import LoweringError
from fxquant.graph import Edge, arguments, constant, edges, op_kind, stage, submodule
from fxquant.quantizers import Quantizer, TwinUniformQuantizer, UniformQuantizer
from fxquant.spec import OpKind, Stage
from fxquant.verify import verify

# The quantizers whose codes this backend multiplies.
_Coded = UniformQuantizer | TwinUniformQuantizer


@torch.no_grad()
def lower_to_integer(gm: fx.GraphModule) -> fx.GraphModule:
    """The integer form of a quantized graph.

    Args:
        gm: in stage FROZEN; not changed.

    Returns:
        A graph that takes and gives what ``gm`` does. Quantizers are ``ToCodes`` or ``TwinToCodes``
        modules or, for constants, integer buffers; products are ``IntLinear``, ``IntConv`` and
        ``IntMatmul``. It has no gradients. ``meta["codes"]`` maps the name of each quantizer of
        ``gm`` to the module or buffer that yields its codes.

    Raises:
        LoweringError: another stage; or a product with a scale along its summed axis or a
            quantizer that is neither uniform nor twin uniform.
    """
    if "stage" not in gm.meta or stage(gm) is not Stage.FROZEN:
        found = stage(gm).name if "stage" in gm.meta else "none"
        raise LoweringError(
            f"lower_to_integer takes a graph in stage FROZEN, got {found}; give it the "
            "graph_module of what fxquant.compile() returned, or call its lower()"
        )
    verify(gm)
    lowered = copy.deepcopy(gm)
    codes, names = _lower_quantizers(lowered)
    _lower_products(lowered, codes)
    for quantizer, code in codes.items():
        _dequantize_rest(lowered, quantizer, code)
    lowered.graph.eliminate_dead_code()
    _drop_unused(lowered)
    del lowered.meta["stage"]
    lowered.meta["codes"] = names
    lowered.graph.lint()
    lowered.recompile()
    return lowered.requires_grad_(False)


def _lower_quantizers(gm: fx.GraphModule) -> tuple[dict[fx.Node, fx.Node], dict[str, str]]:
    """Puts a node that yields codes beside each quantizer whose codes can be multiplied.

    Returns:
        Quantizer node -> code node; quantizer name -> name of the module or buffer.
    """
    codes: dict[fx.Node, fx.Node] = {}
    made: dict[tuple[Any, ...], fx.Node] = {}
    for node in list(gm.graph.nodes):
        quantizer = submodule(gm, node)
        if isinstance(quantizer, _Coded):
            key = _identity(node, quantizer)
            if key not in made:
                made[key] = _emit_codes(gm, node, quantizer)
            codes[node] = made[key]
    return codes, {str(node.target): str(code.target) for node, code in codes.items()}


def _identity(node: fx.Node, quantizer: _Coded) -> tuple[Any, ...]:
    """Equal for quantizer calls that yield equal codes."""
    source = node.all_input_nodes[0]
    value = source.target if source.op == "get_attr" else source
    parameters = (tuple(buffer.flatten().tolist()) for buffer in quantizer.buffers())
    return (value, json.dumps(quantizer.config()), *parameters)


def _emit_codes(gm: fx.GraphModule, node: fx.Node, quantizer: _Coded) -> fx.Node:
    source = node.all_input_nodes[0]
    value = constant(gm, source)
    if value is None:
        module: nn.Module = (
            TwinToCodes(quantizer)
            if isinstance(quantizer, TwinUniformQuantizer)
            else ToCodes(quantizer)
        )
        return _emit(gm, node, f"codes.{_leaf(node)}", module, source)
    name = f"{_leaf(node)}_codes"
    gm.register_buffer(name, quantizer.quantize(value).to(storage_dtype(quantizer)).contiguous())
    with gm.graph.inserting_before(node):
        code = gm.graph.get_attr(name)
    code.meta = _origin(node)
    return code


def _lower_products(gm: fx.GraphModule, codes: dict[fx.Node, fx.Node]) -> None:
    makers: dict[OpKind, Callable[..., fx.Node]] = {
        OpKind.LINEAR: _lower_linear,
        OpKind.CONV: _lower_conv,
        OpKind.MATMUL: _lower_matmul,
    }
    pairs: dict[fx.Node, list[Edge]] = {}
    for edge in edges(gm):
        pairs.setdefault(edge.node, []).append(edge)
    for node, (left, right) in pairs.items():
        quantizers = [submodule(gm, edge.source) for edge in (left, right)]
        if not all(isinstance(quantizer, Quantizer) for quantizer in quantizers):
            continue
        for edge, quantizer in zip((left, right), quantizers, strict=True):
            if not isinstance(quantizer, _Coded):
                raise LoweringError(
                    f"{edge.name} ({edge.path}): the integer backend multiplies the codes of "
                    f"uniform and twin uniform quantizers, got {type(quantizer).__name__}; give "
                    "the edge scheme uniform or keep one operand float (spec: null)"
                )
        kind = op_kind(node)
        assert kind is not None
        new = makers[kind](gm, left, right, codes)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)


def _lower_matmul(
    gm: fx.GraphModule, lhs: Edge, rhs: Edge, codes: dict[fx.Node, fx.Node]
) -> fx.Node:
    sides = (_side(gm, lhs, summed=-1), _side(gm, rhs, summed=-2))
    pair = codes[lhs.source], codes[rhs.source]
    return _emit(gm, lhs.node, f"integer.{lhs.node.name}", IntMatmul(*sides), *pair)


def _lower_linear(
    gm: fx.GraphModule, x: Edge, weight: Edge, codes: dict[fx.Node, fx.Node]
) -> fx.Node:
    quantizer = _weight_quantizer(gm, weight)
    # The product takes the transposed weight, whose output channels lie on the last axis.
    sides = _side(gm, x, summed=-1), Side(quantizer, None if quantizer.axis is None else -1)
    bias, rest = _split_bias(gm, weight, sides, arguments(x.node)["bias"])
    module = IntLinear(*sides, bias)
    operands = codes[x.source], codes[weight.source], *rest
    return _emit(gm, x.node, f"integer.{x.node.name}", module, *operands)


def _lower_conv(
    gm: fx.GraphModule, x: Edge, weight: Edge, codes: dict[fx.Node, fx.Node]
) -> fx.Node:
    quantizer, input_quantizer = _weight_quantizer(gm, weight), submodule(gm, x.source)
    if isinstance(input_quantizer, UniformQuantizer) and input_quantizer.axis is not None:
        reason = "a convolution takes one scale for its input"
        raise _axis_error(x, input_quantizer.axis, reason)
    sides = _side(gm, x, summed=1), Side(quantizer, quantizer.axis)
    bias, rest = _split_bias(gm, weight, sides, arguments(x.node)["bias"])
    kernel = tuple(_constant_shape(gm, weight)[2:])
    module = IntConv(*sides, bias, _geometry(arguments(x.node), kernel))
    operands = codes[x.source], codes[weight.source], *rest
    return _emit(gm, x.node, f"integer.{x.node.name}", module, *operands)


def _side(gm: fx.GraphModule, edge: Edge, *, summed: int) -> Side | TwinSide:
    """An activation as operand of a product over its axis ``summed``.

    Raises:
        LoweringError: the scale runs along that axis, or may do so.
    """
    quantizer = submodule(gm, edge.source)
    if isinstance(quantizer, TwinUniformQuantizer):
        return TwinSide(quantizer)
    assert isinstance(quantizer, UniformQuantizer)
    if quantizer.axis == summed:
        raise _axis_error(edge, quantizer.axis, "the sum runs over it, so no scale factors out")
    if quantizer.axis is not None and quantizer.axis >= 0:
        raise _axis_error(edge, quantizer.axis, "axes of activations are counted from the last")
    return Side(quantizer, quantizer.axis)


def _weight_quantizer(gm: fx.GraphModule, edge: Edge) -> UniformQuantizer:
    quantizer = submodule(gm, edge.source)
    assert isinstance(quantizer, UniformQuantizer)  # AssignSpecs gives weights no other
    if quantizer.axis not in (None, 0):
        raise _axis_error(edge, quantizer.axis, "a weight has one scale or one a row (axis 0)")
    return quantizer


def _axis_error(edge: Edge, axis: int | None, reason: str) -> LoweringError:
    return LoweringError(
        f"{edge.name} ({edge.path}): the integer backend cannot have a scale for each entry of "
        f"axis {axis} here: {reason}. Quantize this edge per tensor or keep it float"
    )


def _constant_shape(gm: fx.GraphModule, edge: Edge) -> torch.Size:
    """Shape of the constant behind a weight's quantizer."""
    value = constant(gm, edge.source.all_input_nodes[0])
    if value is None:
        raise LoweringError(
            f"{edge.name} ({edge.path}): the integer backend takes constant weights, got one "
            "computed at run time; keep this edge float (spec: null)"
        )
    return value.shape


def _split_bias(
    gm: fx.GraphModule, weight: Edge, sides: tuple[Side | TwinSide, Side], bias: fx.Node | None
) -> tuple[Tensor | None, tuple[fx.Node, ...]]:
    """The bias as integer codes, or else as the float argument that it is."""
    depth = _constant_shape(gm, weight)[1:].numel()
    value = constant(gm, bias)
    if bias is None:
        return None, ()
    x, w = sides
    if value is None or x.scale.ndim:
        return None, (bias,)
    codes = bias_codes(value, x.scale * w.scale, depth * x.bound * w.bound)
    return (None, (bias,)) if codes is None else (codes, ())


def _geometry(arguments: dict[str, Any], kernel: tuple[int, ...]) -> Geometry:
    stride = _per_axis(arguments["stride"], len(kernel))
    dilation = _per_axis(arguments["dilation"], len(kernel))
    padding = arguments["padding"]
    if padding == "same":
        spans = [d * (taps - 1) for d, taps in zip(dilation, kernel, strict=True)]
        pairs = tuple((span // 2, span - span // 2) for span in spans)
    else:
        amounts = _per_axis(0 if padding == "valid" else padding, len(kernel))
        pairs = tuple((amount, amount) for amount in amounts)
    groups = arguments["groups"]
    return Geometry(stride=stride, padding=pairs, dilation=dilation, groups=groups)


def _per_axis(value: int | list[int], count: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * count if len(values) == 1 else values)


def _dequantize_rest(gm: fx.GraphModule, node: fx.Node, code: fx.Node) -> None:
    """Gives the products that stay float the values of the codes; removes the quantizer."""
    if node.users:
        quantizer = submodule(gm, node)
        assert isinstance(quantizer, _Coded)
        module: nn.Module = (
            TwinFromCodes(quantizer)
            if isinstance(quantizer, TwinUniformQuantizer)
            else FromCodes(quantizer)
        )
        name = f"values.{_leaf(node)}"
        node.replace_all_uses_with(_emit(gm, node, name, module, code))
    gm.graph.erase_node(node)


def _leaf(node: fx.Node) -> str:
    """Name of the edge that a quantizer call stands on."""
    return str(node.target).rpartition(".")[2]


def _emit(
    gm: fx.GraphModule, node: fx.Node, name: str, module: nn.Module, *args: fx.Node
) -> fx.Node:
    """Adds a module and a call of it before ``node``, whose origin the call takes."""
    gm.add_submodule(name, module.train(gm.training))
    with gm.graph.inserting_before(node):
        call = gm.graph.call_module(name, args)
    call.meta = _origin(node)
    return call


def _origin(node: fx.Node) -> dict[str, Any]:
    kept = ("nn_module_stack", "stack_trace", "path")
    return {key: node.meta[key] for key in kept if key in node.meta}


def _drop_unused(gm: fx.GraphModule) -> None:
    """Removes the modules, and the float weights, that no node reads."""
    gm.delete_all_unused_submodules()
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    called = tuple(f"{node.target}." for node in gm.graph.nodes if node.op == "call_module")
    tensors = [
        *gm.named_parameters(remove_duplicate=False),
        *gm.named_buffers(remove_duplicate=False),
    ]
    for name, _ in tensors:
        if name not in read and not name.startswith(called):
            parent, _, leaf = name.rpartition(".")
            delattr(gm.get_submodule(parent), leaf)
