"""Traces streams through a graph."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, fx

from fxquant.graph.dialect import DATA_MOVEMENT_OPS, aten, op_kind
from fxquant.graph.nodes import arguments, constant, data_users, operand, rank
from fxquant.graph.products import Product
from fxquant.graph.shapes import example_shape
from fxquant.graph.sizes import is_number
from fxquant.rotation.flow import (
    NORMS,
    Carrier,
    Flow,
    NormReader,
    Scale,
    bias_before_weight,
    norm_parameters,
)
from fxquant.rotation.layout import (
    Layout,
    constant_root,
    constant_value,
    has_layout,
    is_same_for_channels,
    layout_in_constant,
    read_layout,
    run_on_numbers,
)

_CONV_TRANSPOSES = (
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
# Operations on one value that treat all channels alike: data movement, means and interpolation.
_PASS_ON = DATA_MOVEMENT_OPS | {
    aten.mean.dim,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.flip.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
    aten.upsample_bicubic2d.vec,
}


def trace_flow(gm: fx.GraphModule) -> Flow:
    """Traces the streams of a graph.

    Args:
        gm: in the canonical dialect, stage FLOAT; not changed.
    """
    tracer = _Tracer(gm, set(), {})
    while not tracer.trace():  # a value showed what an earlier one is: trace with that known
        tracer = _Tracer(gm, tracer.entry_norms, tracer.constants)
    return tracer.flow


class _Tracer:
    """One walk through a graph.

    Args:
        gm: the graph.
        entry_norms: norms whose weight and bias cannot be folded into their readers; extended.
        constants: the layout of each parameter and buffer that a stream contains; extended.
    """

    def __init__(
        self, gm: fx.GraphModule, entry_norms: set[fx.Node], constants: dict[fx.Node, Layout]
    ) -> None:
        self.gm, self.flow = gm, Flow()
        self.entry_norms, self.constants = entry_norms, constants
        self._carriers: dict[fx.Node, Carrier] = {}
        self._elements: dict[fx.Node, list[Carrier]] = {}  # of nodes that yield several tensors

    def trace(self) -> bool:
        """Walks through the graph; False where the walk has to be repeated."""
        known = len(self.entry_norms) + len(self.constants)
        for node in self.gm.graph.nodes:
            if node in self.constants:
                constant_carrier = Carrier(self._new_stream(), self.constants[node])
                self._carriers[node] = self.flow.constants[node] = constant_carrier
            elif op_kind(node) is not None or node.target in _CONV_TRANSPOSES:
                self._visit_product(node)
            elif any(s in self._carriers or s in self._elements for s in node.all_input_nodes):
                carrier = self._result(node)
                if carrier is not None:
                    self._carriers[node] = carrier
        self.entry_norms |= set(filter(self._is_bias_stuck, self.flow.norms))
        return known == len(self.entry_norms) + len(self.constants)

    def _is_bias_stuck(self, norm: fx.Node) -> bool:
        """Whether the bias can neither be folded into readers nor kept before the weight."""
        readers = self.flow.readers_of(norm)
        if self.flow.norms[norm].entry is not None or all(c.shift_exact for _, c in readers):
            return False
        weight, bias = norm_parameters(self.gm, norm)
        return bias_before_weight(weight, bias) is None

    def _new_stream(self) -> int:
        self.flow.joined.append(len(self.flow.joined))
        return len(self.flow.joined) - 1

    def _result(self, node: fx.Node) -> Carrier | None:
        """The channels in the result of an operation that reads a stream, None where it ends."""
        target = node.target
        if target is aten.sym_size.int:
            return None
        if node.op == "call_function":
            carrier = None
            if target in NORMS:
                carrier = self._through_norm(node)
            elif target in (aten.add.Tensor, aten.sub.Tensor):
                carrier = self._through_sum(node)
            elif target in (aten.cat.default, aten.stack.default):
                carrier = self._through_concatenation(node)
            elif target in (aten.mul.Tensor, aten.div.Tensor):
                carrier = self._through_scaling(node)
            elif target is aten.masked_fill.Scalar:
                carrier = self._through_mask(node)
            elif target in _PASS_ON:
                carrier = self._through_movement(node)
            if carrier is not None or node in self._elements:
                return carrier
        self._leave(node, *node.all_input_nodes)
        return None

    def _leave(self, reader: fx.Node, *sources: fx.Node) -> None:
        """Records that an operation reads values as they were before a rotation."""
        for source in sources:
            if source in self._carriers:
                carrier = self._carriers[source]
                self.flow.exits.setdefault(source, (carrier, []))[1].append(reader)

    def _visit_product(self, node: fx.Node) -> None:
        carrier = self._carriers.get(operand(node, 0))
        if carrier is not None and self._is_consumer(node, carrier):
            padded = op_kind(node) is None or not _is_unpadded(node)
            exact = carrier.shift_exact and not padded
            self.flow.consumers.append((node, replace(carrier, shift_exact=exact)))
            self._leave(node, *node.all_input_nodes[1:])
        else:
            self._leave(node, *node.all_input_nodes)
        product = Product(self.gm, node)
        if op_kind(node) is None or not product.has_constant_weight or product.has_computed_bias:
            return
        width = len(product.weight)
        if width > 1 and _groups(node) == 1:
            self.flow.producers[node] = stream = self._new_stream()
            self._carriers[node] = Carrier(
                stream, Layout(width, _channel_axis(product.weight, node))
            )

    def _is_consumer(self, node: fx.Node, carrier: Carrier) -> bool:
        """Whether the columns of a product can undo a rotation of its input."""
        weight = constant(self.gm, node.args[1])
        if weight is None or _groups(node) != 1:
            return False
        bias = node.args[2] if len(node.args) > 2 else None
        if bias is not None and constant(self.gm, bias) is None:
            return False
        return carrier.layout.axis == _channel_axis(weight, operand(node, 0))

    def _through_norm(self, node: fx.Node) -> Carrier | None:
        source = operand(node, 0)
        carrier = self._carriers.get(source)
        if carrier is None or carrier.layout.axis != rank(node) - 1:
            return None
        if list(node.args[1]) != [carrier.layout.size]:  # type: ignore[arg-type]
            return None
        parameters = node.args[2 : 4 if node.target is aten.layer_norm.default else 3]
        if any(p is not None and constant(self.gm, p) is None for p in parameters):
            return None
        if self._begins_stream(carrier):
            return None
        if node not in self.entry_norms:
            self.flow.norms[node] = NormReader(node, carrier, None)
            return replace(carrier, norm=node, shift_exact=True)
        stream = self._new_stream()
        self.flow.norms[node] = NormReader(node, carrier, stream)
        return Carrier(stream, Layout(carrier.layout.size, carrier.layout.axis))

    def _begins_stream(self, *carriers: Carrier | None) -> bool:
        """Makes the norms behind which values are added to others entries."""
        norms = {carrier.norm for carrier in carriers if carrier is not None and carrier.norm}
        self.entry_norms |= norms
        return bool(norms)

    def _through_sum(self, node: fx.Node) -> Carrier | None:
        operands = [value for value in node.args if isinstance(value, fx.Node)]
        if len(operands) != 2 or node.kwargs or node.meta["val"].ndim == 0:
            return None
        carriers = [self._carriers.get(value) for value in operands]
        if self._begins_stream(*carriers):
            return None
        carrier, value = next((c, v) for c, v in zip(carriers, operands, strict=True) if c)
        layout = carrier.layout.in_result(value, node)
        wanted = {v: replace(layout, axis=layout.axis + rank(v) - rank(node)) for v in operands}
        return self._joined(node, replace(carrier, layout=layout), wanted)

    def _through_concatenation(self, node: fx.Node) -> Carrier | None:
        operands: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
        carriers = [self._carriers.get(value) for value in operands]
        present = [carrier for carrier in carriers if carrier is not None]
        norm, width = present[0].norm, present[0].layout.width
        same_norm = len(present) == len(carriers) and all(c.norm is norm for c in present)
        if not same_norm and self._begins_stream(*carriers):
            return None
        axis = arguments(node)["dim"] % rank(operands[0])
        if len(present) < len(carriers) and axis == present[0].layout.axis:
            return None  # channels from outside cannot be told from those of the stream
        wanted = {
            value: present[0].layout if carrier is None else carrier.layout
            for value, carrier in zip(operands, carriers, strict=True)
        }
        if any(layout.width != width for layout in wanted.values()):
            return None
        shown = read_layout(run_on_numbers(node, wanted), width)
        if shown is None:
            return None
        exact = all(carrier.shift_exact for carrier in present)
        return self._joined(node, Carrier(present[0].stream, shown[0], norm, exact), wanted)

    def _joined(
        self, node: fx.Node, result: Carrier, wanted: Mapping[fx.Node, Layout]
    ) -> Carrier | None:
        """Joins the operands of a sum or concatenation; None where they do not fit.

        Args:
            node: the operation.
            result: the channels in its result.
            wanted: the layout that each operand must have; an operand without channels becomes a
                constant of the stream, or an entry.
        """
        entries = []
        for value, layout in wanted.items():
            carrier = self._carriers.get(value)
            if carrier is not None:
                if carrier.layout != layout:
                    return None
                continue
            if not has_layout(value, layout) or value.meta["val"].dtype != node.meta["val"].dtype:
                return None
            root = constant_root(value)
            constant_layout = None if root is None else layout_in_constant(value, layout)
            if root is not None and constant_layout is not None and root not in self.constants:
                self.constants[root] = constant_layout
                return None
            entries.append((value, Carrier(result.stream, layout), node))
        for value in wanted:
            if value in self._carriers:
                stream = self.flow.stream(self._carriers[value].stream)
                self.flow.joined[stream] = self.flow.stream(result.stream)
        self.flow.entries += entries
        return result

    def _through_scaling(self, node: fx.Node) -> Carrier | None:
        """The channels in a product with numbers that are the same for all channels of a token."""
        multiplies = node.target is aten.mul.Tensor
        for value, factor in (node.args, node.args[::-1])[: 1 + multiplies]:
            carrier = self._carriers.get(value) if isinstance(value, fx.Node) else None
            if carrier is None or not isinstance(value, fx.Node) or node.kwargs:
                continue
            layout = carrier.layout.in_result(value, node)
            if not isinstance(factor, fx.Node) or is_same_for_channels(factor, layout, node):
                if factor in self._carriers:
                    self._leave(node, factor)  # type: ignore[arg-type]
                return replace(carrier, layout=layout, shift_exact=False)
            scale = self._scale(node, value, factor, layout) if multiplies else None
            if scale is not None:
                self.flow.scales.append(scale)
                return carrier
        return None

    def _scale(
        self, node: fx.Node, value: fx.Node, factor: fx.Node, layout: Layout
    ) -> Scale | None:
        """The scale of a product's output channels that a multiplication is, None for others."""
        if constant_root(factor) is None or example_shape(value) != example_shape(node):
            return None
        vector = constant_value(self.gm, factor)
        aligned = layout.axis + vector.ndim - rank(node)
        if vector.numel() != layout.width or vector.shape[aligned] != layout.width:
            return None
        product, reader = value, node
        while data_users(product) == [reader] and product.target in DATA_MOVEMENT_OPS:
            product, reader = operand(product, 0), product
        if data_users(product) != [reader] or product not in self.flow.producers:
            return None
        return Scale(node, value, product, vector.detach().flatten())

    def _through_mask(self, node: fx.Node) -> Carrier | None:
        """The channels where a mask sets all channels of some tokens to zero."""
        value, mask, number = operand(node, 0), operand(node, 1), node.args[2]
        carrier = self._carriers.get(value)
        if carrier is None or number != 0 or example_shape(value) != example_shape(node):
            return None
        if not is_same_for_channels(mask, carrier.layout, node):
            return None
        return replace(carrier, shift_exact=False)

    def _through_movement(self, node: fx.Node) -> Carrier | None:
        source, *others = node.all_input_nodes
        if node.target is operator.getitem:
            return self._elements[source][node.args[1]]  # type: ignore[index]
        carrier = self._carriers.get(source)
        if carrier is None or not all(map(is_number, others)):
            return None
        numbers = run_on_numbers(node, {source: carrier.layout})
        elements = [numbers] if isinstance(numbers, Tensor) else list(numbers)
        results = []
        for element in elements:
            shown = read_layout(element, carrier.layout.width)
            if shown is None:
                return None
            layout, padded = shown
            exact = carrier.shift_exact and not padded
            results.append(replace(carrier, layout=layout, shift_exact=exact))
        if isinstance(numbers, Tensor):
            return results[0]
        if all(user.target is operator.getitem for user in node.users):
            self._elements[node] = results
        return None


def _channel_axis(weight: Tensor, node: fx.Node) -> int:
    """Axis of the channels in the input or output of a linear or convolution."""
    return rank(node) - max(weight.ndim - 1, 1)


def _groups(node: fx.Node) -> int:
    return int(arguments(node).get("groups", 1))


def _is_unpadded(node: fx.Node) -> bool:
    """Whether a product reads no padding."""
    padding = arguments(node).get("padding", 0)
    return padding == "valid" or not any(padding if isinstance(padding, list) else [padding])
