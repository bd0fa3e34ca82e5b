"""Rewrites a FROZEN graph so that no float is computed between its first and its last code.

Every value on the way is one of two things: *codes* of a quantizer, or *sums*, integer
accumulators with a constant unit. A product, norm, softmax, sum or mean of codes gives sums. What a
quantizer reads is traced back, through operations that only move or scale values, to where these
sums are made; they become its codes there (:mod:`requantize`), and the codes move on. So the unit
of a channel never has to follow its values through a reshape, and a factor costs nothing.

The graph is built anew: first what comes before the first quantizer, in float; then the integer
part; then the outputs, in float again.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fxquant.backends.integer.elementwise import Dequantize, Lookup, table_of
from fxquant.backends.integer.graph_builder import NewGraph
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
    curve_module,
    elementwise_module,
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
    """A product of codes, left in units of its accumulator.

    Args:
        product: the operands' scales and zero points, the bias.
        multiply: the exact product of two operands.
    """

    def __init__(self, product: Product, multiply: Multiply) -> None:
        super().__init__()
        self.product, self.multiply = product, multiply

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Sums, int32 or int64."""
        return self.product.accumulate(self.multiply, left, right)


def build_integer_only(gm: fx.GraphModule, multiply: Multiply) -> fx.GraphModule:
    """The integer-only form of a quantized graph.

    Args:
        gm: in stage FROZEN; not changed.
        multiply: the exact product of two operands.

    Returns:
        The graph; ``meta["codes"]`` maps the name of each quantizer of ``gm`` to the node that
        yields its codes.

    Raises:
        LoweringError: an operation between the first quantizer and the last product has no integer
            form, or an operand that is not quantized; the message names it.
    """
    return _Builder(gm, multiply).build()


class _Builder:
    """A new graph beside the old one; nodes of the new one are made on demand and once."""

    def __init__(self, gm: fx.GraphModule, multiply: Multiply) -> None:
        self._gm, self._multiply = gm, multiply
        self._new = NewGraph(training=gm.training)
        self._edges: dict[fx.Node, list[Edge]] = {}
        for edge in possible_edges(gm):
            self._edges.setdefault(edge.node, []).append(edge)
        self._image = fed_by_image(gm)
        # Old nodes -> what they became.
        self._sums: dict[fx.Node, Accumulator | CodeFunction] = {}
        self._codes: dict[tuple[fx.Node, CodeRequest], fx.Node] = {}
        self._floats: dict[fx.Node, fx.Node] = {}
        self._sizes: dict[fx.Node, fx.Node] = {}
        self._coded: dict[str, str] = {}

    def build(self) -> fx.GraphModule:
        nodes = list(self._gm.graph.nodes)
        for node in self._image:
            self._float(node)
        for node in self._image:
            for user in node.users:
                if has_codes(submodule(self._gm, user)):
                    self._code(user)
        needed = feeding_quantizers(nodes)
        for node in nodes:
            if node.op == "call_function" and node not in self._image:
                self._visit(node, needed=node in needed)
        (returned,) = self._gm.graph.output_node().args
        lowered = self._new.finish(fx.map_arg(returned, self._float))
        CODE_NAMES.set(lowered, self._coded)
        return lowered

    def _visit(self, node: fx.Node, *, needed: bool) -> None:
        """Computes what quantizers read; what only moves or scales values waits until asked for."""
        if is_number(node):
            self._size(node)
        elif self._reads_codes(node):
            self._sums[node] = self._lower(node)
        elif op_kind(node) is not None or (needed and not self._passes_codes(node)):
            raise LoweringError(self._no_form(node))

    def _reads_codes(self, node: fx.Node) -> bool:
        """Whether the inputs of an operation are quantized.

        Raises:
            LoweringError: some are and some are not.
        """
        edges = self._edges.get(node, [])
        coded = [has_codes(submodule(self._gm, edge.source)) for edge in edges]
        if any(coded) and not all(coded):
            raise LoweringError(f"{node.name} has an operand that is not quantized")
        return any(coded)

    def _passes_codes(self, node: fx.Node) -> bool:
        known = node.target in DATA_MOVEMENT_OPS or node.target in (aten.cat.default, *MEANS)
        return known or scaling(self._gm, node) is not None

    def _no_form(self, node: fx.Node) -> str:
        if node in self._edges:
            return f"{node.name} reads a value that is not quantized"
        name = str(node.target).removeprefix("aten.").split(".")[0]
        return f"{node.name}: {name} has no integer form"

    # Sums

    def _lower(self, node: fx.Node) -> Accumulator | CodeFunction:
        """The integer form of an operation whose inputs are quantized."""
        edges = self._edges[node]
        codes = [self._code(edge.source) for edge in edges]
        if op_kind(node) is not None:
            product, rest = make_product(self._gm, *edges)
            if rest:
                raise LoweringError(f"the bias of {node.name} is no whole number of its units")
            call = self._new.call(node.name, Accumulate(product, self._multiply), *codes)
            weight = constant(self._gm, edges[1].source.all_input_nodes[0])
            return sums_of_product(call, product, weight, node)
        quantizers = [self._uniform(edge) for edge in edges]
        if edges[0].kind is OpKind.ACTIVATION:
            return CodeFunction(codes[0], quantizers[0], function_of(node))
        module = elementwise_module(self._gm, node, quantizers)
        call = self._new.call(node.name, module, *codes)
        return Accumulator(
            call, torch.tensor(module.scale, dtype=torch.float64), None, module.bound
        )

    def _uniform(self, edge: Edge) -> AffineQuantizer:
        quantizer = submodule(self._gm, edge.source)
        if not isinstance(quantizer, AffineQuantizer) or quantizer.axis is not None:
            raise LoweringError(f"{edge.name} needs one scale and one zero point")
        return quantizer

    def _sum(self, node: fx.Node) -> Accumulator:
        """The sums that a value is made of.

        Raises:
            LoweringError: it is made of none, or a move would part them from their units.
        """
        found = self._sums.get(node)
        if not isinstance(found, Accumulator):
            found = self._sums[node] = self._make_sums(node, found)
        return found

    def _make_sums(self, node: fx.Node, curve: CodeFunction | None) -> Accumulator:
        if curve is not None:
            module, unit, bound = curve_module(curve)
            call = self._new.call(f"{node.name}_values", module, curve.node)
            return Accumulator(call, unit, None, bound)
        factor = scaling(self._gm, node)
        if node.target in MEANS or node.target in DATA_MOVEMENT_OPS or factor is not None:
            inner = self._sum(node.all_input_nodes[0] if factor is None else factor.source)
            if node.target in MEANS:
                mean, count = mean_module(node, inner)
                call = self._new.call(node.name, mean, inner.node)
                return Accumulator(call, inner.scale / count, None, inner.bound * count)
            if factor is not None and factor.axis is None:
                return inner._replace(scale=inner.scale * factor.values)
            if factor is None and inner.axis is None:
                return inner._replace(node=self._moved(node, inner.node))
        raise LoweringError(f"{node.name} gives no integers of one unit, which its reader needs")

    # Codes

    def _code(self, call: fx.Node) -> fx.Node:
        """The codes that a quantizer call yields."""
        quantizer = submodule(self._gm, call)
        assert isinstance(quantizer, Quantizer)
        made = self._wanted(call.all_input_nodes[0], CodeRequest.of(quantizer))
        self._coded[str(call.target)] = made.name
        return made

    def _wanted(self, node: fx.Node, wanted: CodeRequest) -> fx.Node:
        """Codes of a value."""
        key = (node, wanted)
        if key not in self._codes:
            made = self._codes_here(node, wanted)
            if made is None and wanted.axis is not None:
                made = self._codes_by_channel(node, wanted)
            self._codes[key] = self._codes_through(node, wanted) if made is None else made
        return self._codes[key]

    def _codes_here(self, node: fx.Node, wanted: CodeRequest) -> fx.Node | None:
        """Codes where the value is made; None where it is only moved or scaled."""
        name, value = f"{node.name}_codes", constant(self._gm, node)
        if value is not None:
            return self._new.buffer(name, wanted.constant(value))
        if node in self._image:
            if self._sums:  # a quantizer of its own would have been met at the start
                raise LoweringError(f"{node.name} is float and joins integer values")
            to_codes = integer_form(wanted.quantizer).to_codes(wanted.quantizer)
            return self._new.call(name, to_codes, self._float(node))
        found = self._sum(node) if node.target in MEANS else self._sums.get(node)
        if isinstance(found, CodeFunction):
            table = wanted.table(table_of(found.quantizer, found.function))
            return self._new.call(name, Lookup(table, found.quantizer.qmin), found.node)
        if found is not None and wanted.fits(found):
            return self._new.call(name, wanted.requantizer(found), found.node)
        return None

    def _codes_through(self, node: fx.Node, wanted: CodeRequest) -> fx.Node:
        """Codes of what an operation moves or scales, moved."""
        factor = scaling(self._gm, node)
        if factor is not None:
            return self._wanted(factor.source, wanted.times(factor))
        if node.target is aten.cat.default:
            tensors = arguments(node)["tensors"]
            parts = [self._wanted(part, wanted) for part in tensors]
            return self._new.function(node.target, (parts, *node.args[1:]), node.kwargs)
        if node.target in DATA_MOVEMENT_OPS:
            return self._moved(node, self._wanted(node.all_input_nodes[0], wanted), wanted)
        raise LoweringError(self._no_form(node))

    def _codes_by_channel(self, node: fx.Node, wanted: CodeRequest) -> fx.Node:
        """Codes with a scale for each head: requantized by channel where their sums are made."""
        source, moves = node, []
        while source not in self._sums and source.target in DATA_MOVEMENT_OPS:
            moves.append(source)
            source = source.all_input_nodes[0]
        sums = self._sum(source)
        axis = -1 if sums.axis is None else sums.axis
        heads = heads_of_channels(source, node, axis, wanted)
        codes = self._wanted(source, wanted.by_channel(heads, axis))
        for move in reversed(moves):
            codes = self._moved(move, codes, wanted)
        return codes

    def _moved(self, node: fx.Node, value: fx.Node, wanted: CodeRequest | None = None) -> fx.Node:
        """The move ``node`` of other values: codes, or sums where ``wanted`` is None."""
        source = node.all_input_nodes[0]
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda n: value if n is source else self._size(n)
        )
        if node.target is aten.pad.default:
            given = arguments(node)
            if given["mode"] != "constant" or given["value"]:
                raise LoweringError(f"{node.name} pads with something else than zero")
            zero = 0 if wanted is None else wanted.zero_code()
            args, kwargs = (value, given["pad"], "constant", zero), {}
        return self._new.function(node.target, args, kwargs)

    # Sizes and floats

    def _size(self, node: fx.Node) -> fx.Node:
        """A number computed from sizes."""
        if node not in self._sizes:
            self._sizes[node] = self._new.graph.node_copy(
                node, lambda n: self._size(n) if is_number(n) else self._of_that_shape(n)
            )
        return self._sizes[node]

    def _of_that_shape(self, node: fx.Node) -> fx.Node:
        """A value of the shape that an old node has."""
        if node in self._image:
            return self._float(node)
        found = self._sums.get(node)
        if found is not None:
            return found.node
        if node.target in DATA_MOVEMENT_OPS:
            return self._moved(node, self._of_that_shape(node.all_input_nodes[0]))
        factor = scaling(self._gm, node)
        if factor is not None:
            return self._of_that_shape(factor.source)
        raise LoweringError(f"{node.name} has a size that is asked for, and no integer form")

    def _float(self, node: fx.Node) -> fx.Node:
        """A value as floats: the image, what is computed of it before any code, and the outputs."""
        if is_number(node):
            return self._size(node)
        if node not in self._floats:
            self._floats[node] = self._make_float(node)
        return self._floats[node]

    def _make_float(self, node: fx.Node) -> fx.Node:
        value, found = constant(self._gm, node), self._sums.get(node)
        if value is not None:
            return self._new.buffer(node.name, value)
        if isinstance(found, CodeFunction):
            lookup = Lookup(table_of(found.quantizer, found.function), found.quantizer.qmin)
            return self._new.call(f"{node.name}_out", lookup, found.node)
        if found is not None:
            values = Dequantize(found.scale, found.axis)
            return self._new.call(f"{node.name}_out", values, found.node)
        return self._new.graph.node_copy(node, self._float)
