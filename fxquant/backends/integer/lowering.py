"""Rewrites a FROZEN graph so that its products run on integer codes.

Before: ``linear(q_x(x), q_W(W), b)``
After:  ``int_linear(to_codes(x), W_codes)``, ``W_codes`` and the bias integer buffers

Codes of a twin quantizer are its code words; a product separates them by region (:mod:`twin`).
Codes of a logarithmic quantizer are decoded by a table and a shift (:mod:`log`).

A product whose operands are not both quantized stays float, on dequantized codes where an operand
has codes. Equal quantizers of one value become one quantizer, so that the value is quantized once.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import fx, nn

from fxquant.backends.integer.integer_only import build_integer_only
from fxquant.backends.integer.kernels import affine_matmul, affine_whole
from fxquant.backends.integer.lowerings import has_codes, integer_form
from fxquant.backends.integer.modules import storage_dtype
from fxquant.backends.integer.products import make_product
from fxquant.config.vocabulary import Stage
from fxquant.errors import LoweringError
from fxquant.graph.edges import Edge, edges, quantized_edges
from fxquant.graph.meta import CODE_NAMES, FLOAT_BECAUSE, STAGE, origin
from fxquant.graph.nodes import constant, submodule
from fxquant.graph.verify import verify
from fxquant.quantizers import Quantizer


@torch.no_grad()
def lower_to_integer(
    gm: fx.GraphModule, *, integer_only: bool | None = None, float_products: bool = False
) -> fx.GraphModule:
    """Lowers a quantized graph to its integer form.

    Args:
        gm: the graph in stage FROZEN; not changed.
        integer_only: whether to compute nothing in float between the first and the last code
            (:mod:`integer_only`). None: integer-only where the policy quantizes elementwise
            operations and the whole graph has an integer form.
        float_products: whether products of the integer-only form multiply whole numbers held as
            floats, which is faster and has the same results.

    Returns:
        A graph with the inputs and outputs of ``gm``. ``meta["float_because"]`` has the reason why
        the graph is not integer-only, and is empty where it is integer-only. A graph that is not
        integer-only has modules such as ``ToCodes`` or, for constants, integer buffers in the place
        of quantizers, and ``IntLinear``, ``IntConv`` and ``IntMatmul`` in the place of products.
        The graph has no gradients. ``meta["codes"]`` maps the name of each quantizer of ``gm`` to
        the module or buffer that yields its codes.

    Raises:
        LoweringError: a flag is not a boolean; the graph is in another stage; it was to be
            integer-only and cannot be; or a product has a scale along its summed axis or a
            quantizer without integer form.
    """
    if integer_only is not None and not isinstance(integer_only, bool):
        raise LoweringError(
            f"integer_only must be true, false or None, got {integer_only!r:.80}",
            got=integer_only,
            expected=(True, False, None),
        )
    if not isinstance(float_products, bool):
        raise LoweringError(
            f"float_products must be true or false, got {float_products!r:.80}",
            got=float_products,
            expected=(True, False),
        )
    current = STAGE.get(gm)
    if current is not Stage.FROZEN:
        stage_name = "none" if current is None else current.name
        raise LoweringError(
            f"lower_to_integer needs a graph in stage FROZEN, got {stage_name}; give it the "
            "graph_module of what fxquant.compile() returned, or call its lower()",
            got=current,
            expected=Stage.FROZEN,
        )
    verify(gm)
    reason = "it was not asked for"
    if integer_only is not False:
        integer_only_form, reason = _integer_only(gm, bool(integer_only), float_products)
        if integer_only_form is not None:
            return integer_only_form
        if integer_only:
            raise LoweringError(
                f"no integer-only form: {reason}. Quantize the operations between products as "
                "policies.w8a8(full=True) does, or leave integer_only out"
            )
    lowered = copy.deepcopy(gm)
    codes, names = _lower_quantizers(lowered)
    _lower_products(lowered, codes)
    for quantizer, code in codes.items():
        _dequantize_rest(lowered, quantizer, code)
    lowered.graph.eliminate_dead_code()
    _drop_unused(lowered)
    STAGE.remove(lowered)
    CODE_NAMES.set(lowered, names)
    FLOAT_BECAUSE.set(lowered, reason)
    lowered.graph.lint()
    lowered.recompile()
    return lowered.requires_grad_(False)


def _integer_only(
    gm: fx.GraphModule, required: bool, float_products: bool
) -> tuple[fx.GraphModule | None, str]:
    """Builds the integer-only form; without one, None and the reason."""
    if not required and all(edge.kind.is_product for edge in quantized_edges(gm)):
        return None, "nothing between its products is quantized"
    try:
        lowered = build_integer_only(gm, affine_matmul if float_products else affine_whole)
    except LoweringError as error:
        return None, str(error)
    FLOAT_BECAUSE.set(lowered, "")
    return lowered.requires_grad_(False), ""


def _lower_quantizers(gm: fx.GraphModule) -> tuple[dict[fx.Node, fx.Node], dict[str, str]]:
    """Adds a node that yields codes before each quantizer whose codes can be multiplied.

    Returns:
        Quantizer node -> code node; quantizer name -> name of the module or buffer.
    """
    codes: dict[fx.Node, fx.Node] = {}
    codes_by_key: dict[tuple[Any, ...], fx.Node] = {}
    for node in list(gm.graph.nodes):
        quantizer = submodule(gm, node)
        if isinstance(quantizer, Quantizer) and has_codes(quantizer):
            key = _identity(node, quantizer)
            if key not in codes_by_key:
                codes_by_key[key] = _emit_codes(gm, node, quantizer)
            codes[node] = codes_by_key[key]
    return codes, {str(node.target): str(code.target) for node, code in codes.items()}


def _identity(node: fx.Node, quantizer: Quantizer) -> tuple[Any, ...]:
    """Key of a quantizer call, equal for calls that yield equal codes."""
    source = node.all_input_nodes[0]
    value = source.target if source.op == "get_attr" else source
    parameters = (tuple(buffer.flatten().tolist()) for buffer in quantizer.buffers())
    return (value, json.dumps(quantizer.config()), *parameters)


def _emit_codes(gm: fx.GraphModule, node: fx.Node, quantizer: Quantizer) -> fx.Node:
    source = node.all_input_nodes[0]
    value = constant(gm, source)
    if value is None:
        return _emit(
            gm,
            node,
            f"codes.{_edge_name(node)}",
            integer_form(quantizer).to_codes(quantizer),
            source,
        )
    name = f"{_edge_name(node)}_codes"
    gm.register_buffer(name, quantizer.quantize(value).to(storage_dtype(quantizer)).contiguous())
    with gm.graph.inserting_before(node):
        code = gm.graph.get_attr(name)
    code.meta = origin(node)
    return code


def _lower_products(gm: fx.GraphModule, codes: dict[fx.Node, fx.Node]) -> None:
    pairs: dict[fx.Node, list[Edge]] = {}
    for edge in edges(gm):
        if edge.kind.is_product:
            pairs.setdefault(edge.node, []).append(edge)
    for node, (left, right) in pairs.items():
        if all(isinstance(submodule(gm, edge.source), Quantizer) for edge in (left, right)):
            module, float_bias = make_product(gm, left, right)
            operands = codes[left.source], codes[right.source], *float_bias
            new = _emit(gm, node, f"integer.{node.name}", module, *operands)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)


def _dequantize_rest(gm: fx.GraphModule, node: fx.Node, code: fx.Node) -> None:
    """Connects float products to dequantized codes and removes the quantizer."""
    if node.users:
        quantizer = submodule(gm, node)
        assert isinstance(quantizer, Quantizer)
        name = f"values.{_edge_name(node)}"
        node.replace_all_uses_with(
            _emit(gm, node, name, integer_form(quantizer).from_codes(quantizer), code)
        )
    gm.graph.erase_node(node)


def _edge_name(node: fx.Node) -> str:
    """Name of the edge that a quantizer call belongs to."""
    return str(node.target).rpartition(".")[2]


def _emit(
    gm: fx.GraphModule, node: fx.Node, name: str, module: nn.Module, *args: fx.Node
) -> fx.Node:
    """Adds a module and, before ``node`` and with the origin of ``node``, a call of the module."""
    gm.add_submodule(name, module.train(gm.training))
    with gm.graph.inserting_before(node):
        call = gm.graph.call_module(name, args)
    call.meta = origin(node)
    return call


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
