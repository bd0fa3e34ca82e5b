"""Rewrites a FROZEN graph so that no float is computed between its first and its last code.

Terms:

- *codes*: integers that a quantizer yields;
- *sums*: integer accumulators with a constant unit, as products, norms, softmax, sums and means of
  codes yield them (``Accumulator``);
- *function of codes*: an activation function before it becomes a table (``CodeFunction``);
- *request*: the codes that a reader needs of a value (``CodeRequest``);
- *float graph* and *lowered graph*: the given graph, and the graph built from it.

Every value between the first and the last code is codes, sums or a function of codes. The lowering
traces the input of a quantizer back, through operations that only move or scale values, to the
sums that it is made of. The sums become codes there (:mod:`requantize`), and the codes are moved
instead. In this way the unit of a channel never has to follow its values through a reshape, and a
factor costs nothing.

The lowered graph begins with the operations before the first quantizer, in float; the integer
operations follow, then the outputs, in float again.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fxquant.backends.integer.elementwise import Dequantize, Lookup, table_of
from fxquant.backends.integer.graph_builder import GraphBuilder
from fxquant.backends.integer.kernels import Multiply
from fxquant.backends.integer.lowered_values import (
    Accumulator,
    CodeFunction,
    CodeRequest,
    heads_of_channels,
    scaling,
    sums_of_product,
)
from fxquant.backends.integer.lowerings import has_codes, integer_form
from fxquant.backends.integer.operations import (
    MEANS,
    elementwise_module,
    function_module,
    function_of,
    mean_module,
)
from fxquant.backends.integer.partition import fed_by_image, feeding_quantizers
from fxquant.backends.integer.products import Product, make_product
from fxquant.config.vocabulary import OpKind
from fxquant.errors import LoweringError
from fxquant.graph.dialect import DATA_MOVEMENT_OPS, aten, op_kind
from fxquant.graph.edges import Edge, possible_edges
from fxquant.graph.meta import CODE_NAMES
from fxquant.graph.nodes import arguments, constant, submodule
from fxquant.graph.sizes import is_number
from fxquant.quantizers import AffineQuantizer, Quantizer


class Accumulate(nn.Module):
    """Product of codes whose output stays in units of its accumulator.

    Args:
        product: module with the operands' scales and zero points and the bias.
        multiply: exact product of two operands.
    """

    def __init__(self, product: Product, multiply: Multiply) -> None:
        super().__init__()
        self.product, self.multiply = product, multiply

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Sums of the product, int32 or int64."""
        return self.product.accumulate(self.multiply, left, right)


def build_integer_only(gm: fx.GraphModule, multiply: Multiply) -> fx.GraphModule:
    """Builds the integer-only form of a quantized graph.

    Args:
        gm: the graph in stage FROZEN; not changed.
        multiply: exact product of two operands.

    Returns:
        The lowered graph; ``meta["codes"]`` maps the name of each quantizer of ``gm`` to the node
        that yields its codes.

    Raises:
        LoweringError: an operation between the first quantizer and the last product has no integer
            form, or an operand that is not quantized; the message names it.
    """
    return _IntegerOnlyLowering(gm, multiply).build()


class _IntegerOnlyLowering:
    """Builds the lowered graph; each of its nodes is made once, when a reader asks for it."""

    def __init__(self, gm: fx.GraphModule, multiply: Multiply) -> None:
        self._gm, self._multiply = gm, multiply
        self._builder = GraphBuilder(training=gm.training)
        self._edges: dict[fx.Node, list[Edge]] = {}
        for edge in possible_edges(gm):
            self._edges.setdefault(edge.node, []).append(edge)
        self._before_codes = fed_by_image(gm)
        # Nodes of the float graph -> their forms in the lowered graph.
        self._values: dict[fx.Node, Accumulator | CodeFunction] = {}
        self._codes: dict[tuple[fx.Node, CodeRequest], fx.Node] = {}
        self._floats: dict[fx.Node, fx.Node] = {}
        self._sizes: dict[fx.Node, fx.Node] = {}
        self._code_names: dict[str, str] = {}

    def build(self) -> fx.GraphModule:
        nodes = list(self._gm.graph.nodes)
        for node in self._before_codes:
            self._float(node)
        for node in self._before_codes:
            for user in node.users:
                if has_codes(submodule(self._gm, user)):
                    self._quantizer_codes(user)
        needed = feeding_quantizers(nodes)
        for node in nodes:
            if node.op == "call_function" and node not in self._before_codes:
                self._visit(node, needed=node in needed)
        (returned,) = self._gm.graph.output_node().args
        lowered = self._builder.finish(fx.map_arg(returned, self._float))
        CODE_NAMES.set(lowered, self._code_names)
        return lowered

    def _visit(self, node: fx.Node, *, needed: bool) -> None:
        """Lowers an operation on codes; operations that move or scale values wait for a reader."""
        if is_number(node):
            self._size(node)
        elif self._reads_codes(node):
            self._values[node] = self._lower(node)
        elif op_kind(node) is not None or (needed and not self._passes_codes(node)):
            raise LoweringError(self._no_form(node), edge=node.name)

    def _reads_codes(self, node: fx.Node) -> bool:
        """Whether the inputs of an operation are quantized.

        Raises:
            LoweringError: some inputs are quantized and others are not.
        """
        edges = self._edges.get(node, [])
        quantized = [has_codes(submodule(self._gm, edge.source)) for edge in edges]
        if any(quantized) and not all(quantized):
            raise LoweringError(f"{node.name} has an operand that is not quantized", edge=node.name)
        return any(quantized)

    def _passes_codes(self, node: fx.Node) -> bool:
        """Whether an operation only moves, joins, averages or scales values."""
        has_rule = node.target in DATA_MOVEMENT_OPS or node.target in (aten.cat.default, *MEANS)
        return has_rule or scaling(self._gm, node) is not None

    def _no_form(self, node: fx.Node) -> str:
        if node in self._edges:
            return f"{node.name} reads a value that is not quantized"
        name = str(node.target).removeprefix("aten.").split(".")[0]
        return f"{node.name}: {name} has no integer form"

    # Sums

    def _lower(self, node: fx.Node) -> Accumulator | CodeFunction:
        """The integer form of an operation whose inputs are quantized."""
        edges = self._edges[node]
        codes = [self._quantizer_codes(edge.source) for edge in edges]
        if op_kind(node) is not None:
            product, float_bias = make_product(self._gm, *edges)
            if float_bias:
                raise LoweringError(
                    f"the bias of {node.name} is not a whole number of its units", edge=node.name
                )
            call = self._builder.call(node.name, Accumulate(product, self._multiply), *codes)
            weight = constant(self._gm, edges[1].source.all_input_nodes[0])
            return sums_of_product(call, product, weight, node)
        quantizers = [self._uniform(edge) for edge in edges]
        if edges[0].kind is OpKind.ACTIVATION:
            return CodeFunction(codes[0], quantizers[0], function_of(node))
        module = elementwise_module(self._gm, node, quantizers)
        call = self._builder.call(node.name, module, *codes)
        return Accumulator(
            call, torch.tensor(module.scale, dtype=torch.float64), None, module.bound
        )

    def _uniform(self, edge: Edge) -> AffineQuantizer:
        quantizer = submodule(self._gm, edge.source)
        if not isinstance(quantizer, AffineQuantizer) or quantizer.axis is not None:
            raise LoweringError(f"{edge.name} needs one scale and one zero point", edge=edge.name)
        return quantizer

    def _sums_of(self, node: fx.Node) -> Accumulator:
        """Sums that represent a value.

        Raises:
            LoweringError: no sums represent the value, or data movement would separate sums from
                their units.
        """
        sums = self._values.get(node)
        if not isinstance(sums, Accumulator):
            sums = self._values[node] = self._make_sums(node, sums)
        return sums

    def _make_sums(self, node: fx.Node, function: CodeFunction | None) -> Accumulator:
        if function is not None:
            module, unit, bound = function_module(function)
            call = self._builder.call(f"{node.name}_values", module, function.node)
            return Accumulator(call, unit, None, bound)
        factor = scaling(self._gm, node)
        if node.target in MEANS or node.target in DATA_MOVEMENT_OPS or factor is not None:
            sums = self._sums_of(node.all_input_nodes[0] if factor is None else factor.source)
            if node.target in MEANS:
                mean, count = mean_module(node, sums)
                call = self._builder.call(node.name, mean, sums.node)
                return Accumulator(call, sums.scale / count, None, sums.bound * count)
            if factor is not None and factor.axis is None:
                return sums._replace(scale=sums.scale * factor.values)
            if factor is None and sums.axis is None:
                return sums._replace(node=self._moved(node, sums.node))
        raise LoweringError(
            f"{node.name} yields no integers of one unit, which its reader needs", edge=node.name
        )

    # Codes

    def _quantizer_codes(self, call: fx.Node) -> fx.Node:
        """Codes that a quantizer call of the float graph yields."""
        quantizer = submodule(self._gm, call)
        assert isinstance(quantizer, Quantizer)
        codes = self._requested_codes(call.all_input_nodes[0], CodeRequest.of(quantizer))
        self._code_names[str(call.target)] = codes.name
        return codes

    def _requested_codes(self, node: fx.Node, request: CodeRequest) -> fx.Node:
        """Codes of a value, as requested."""
        key = (node, request)
        if key not in self._codes:
            codes = self._codes_at_source(node, request)
            if codes is None and request.axis is not None:
                codes = self._codes_by_channel(node, request)
            self._codes[key] = self._moved_codes(node, request) if codes is None else codes
        return self._codes[key]

    def _codes_at_source(self, node: fx.Node, request: CodeRequest) -> fx.Node | None:
        """Codes of a value that is computed here; None where ``node`` only moves or scales it."""
        name, constant_value = f"{node.name}_codes", constant(self._gm, node)
        if constant_value is not None:
            return self._builder.buffer(name, request.constant(constant_value))
        if node in self._before_codes:
            if self._values:  # otherwise build() would have lowered its quantizer first
                raise LoweringError(
                    f"{node.name} is float and joins integer values", edge=node.name
                )
            to_codes = integer_form(request.quantizer).to_codes(request.quantizer)
            return self._builder.call(name, to_codes, self._float(node))
        lowered = self._sums_of(node) if node.target in MEANS else self._values.get(node)
        if isinstance(lowered, CodeFunction):
            table = request.table(table_of(lowered.quantizer, lowered.function))
            return self._builder.call(name, Lookup(table, lowered.quantizer.qmin), lowered.node)
        if lowered is not None and request.fits(lowered):
            return self._builder.call(name, request.requantizer(lowered), lowered.node)
        return None

    def _moved_codes(self, node: fx.Node, request: CodeRequest) -> fx.Node:
        """Codes of the input of an operation that moves or scales values, moved likewise."""
        factor = scaling(self._gm, node)
        if factor is not None:
            return self._requested_codes(factor.source, request.times(factor))
        if node.target is aten.cat.default:
            tensors = arguments(node)["tensors"]
            codes = [self._requested_codes(tensor, request) for tensor in tensors]
            return self._builder.function(node.target, (codes, *node.args[1:]), node.kwargs)
        if node.target in DATA_MOVEMENT_OPS:
            return self._moved(
                node, self._requested_codes(node.all_input_nodes[0], request), request
            )
        raise LoweringError(self._no_form(node), edge=node.name)

    def _codes_by_channel(self, node: fx.Node, request: CodeRequest) -> fx.Node:
        """Codes with a scale for each head, requantized by channel where their sums are made."""
        source, moves = node, []
        while source not in self._values and source.target in DATA_MOVEMENT_OPS:
            moves.append(source)
            source = source.all_input_nodes[0]
        sums = self._sums_of(source)
        axis = -1 if sums.axis is None else sums.axis
        heads = heads_of_channels(source, node, axis, request)
        codes = self._requested_codes(source, request.by_channel(heads, axis))
        for move in reversed(moves):
            codes = self._moved(move, codes, request)
        return codes

    def _moved(self, node: fx.Node, value: fx.Node, request: CodeRequest | None = None) -> fx.Node:
        """Moves codes like ``node`` moves its input; moves sums where ``request`` is None."""
        source = node.all_input_nodes[0]
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda n: value if n is source else self._size(n)
        )
        if node.target is aten.pad.default:
            options = arguments(node)
            if options["mode"] != "constant" or options["value"]:
                raise LoweringError(
                    f"{node.name} pads with something else than zero", edge=node.name
                )
            zero = 0 if request is None else request.zero_code()
            args, kwargs = (value, options["pad"], "constant", zero), {}
        return self._builder.function(node.target, args, kwargs)

    # Sizes and floats

    def _size(self, node: fx.Node) -> fx.Node:
        """Number computed from sizes of tensors, in the lowered graph."""
        if node not in self._sizes:
            self._sizes[node] = self._builder.graph.node_copy(
                node, lambda n: self._size(n) if is_number(n) else self._value_of_same_shape(n)
            )
        return self._sizes[node]

    def _value_of_same_shape(self, node: fx.Node) -> fx.Node:
        """Node of the lowered graph whose shape is that of ``node`` in the float graph."""
        if node in self._before_codes:
            return self._float(node)
        lowered = self._values.get(node)
        if lowered is not None:
            return lowered.node
        if node.target in DATA_MOVEMENT_OPS:
            return self._moved(node, self._value_of_same_shape(node.all_input_nodes[0]))
        factor = scaling(self._gm, node)
        if factor is not None:
            return self._value_of_same_shape(factor.source)
        raise LoweringError(
            f"the size of {node.name} is needed, which has no integer form", edge=node.name
        )

    def _float(self, node: fx.Node) -> fx.Node:
        """Float form of a value: the image, values computed from it before any code, outputs."""
        if is_number(node):
            return self._size(node)
        if node not in self._floats:
            self._floats[node] = self._make_float(node)
        return self._floats[node]

    def _make_float(self, node: fx.Node) -> fx.Node:
        value, lowered = constant(self._gm, node), self._values.get(node)
        if value is not None:
            return self._builder.buffer(node.name, value)
        if isinstance(lowered, CodeFunction):
            lookup = Lookup(table_of(lowered.quantizer, lowered.function), lowered.quantizer.qmin)
            return self._builder.call(f"{node.name}_out", lookup, lowered.node)
        if lowered is not None:
            values = Dequantize(lowered.scale, lowered.axis)
            return self._builder.call(f"{node.name}_out", values, lowered.node)
        return self._builder.graph.node_copy(node, self._float)
