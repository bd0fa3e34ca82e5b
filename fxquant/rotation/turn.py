"""Rotates streams: rewrites the parameters around them.

``x' = Q x`` for the values of a stream; ``gamma`` and ``beta`` are weight and bias of a norm:

- producer ``W x + b``: ``Q W x + Q b``; first a scale ``s`` behind it is folded;
- constant ``c``: ``Q c``;
- consumer ``W x + b``: ``W Q^T x' + b``;
- consumer behind a norm ``W (gamma n + beta) + b``: ``W diag(gamma) Q^T n' + (b + W beta)``, where
  ``n'`` is the output of the norm with weight 1 and bias 0;
- where zeros are padded between norm and consumer, the norm keeps the bias ``Q (beta / gamma)``;
- exit: ``Q^T x'``, or ``diag(gamma) Q^T n' + beta``, by a linear;
- entry ``x``: ``Q x`` by a linear; behind a norm that is an entry, and reads a stream rotated by P,
  one linear yields ``Q diag(gamma) P^T n' + Q beta``.

A value that holds several tokens in its channels, as in patch merging, has ``diag(Q, Q, …)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.graph.capture import device_of
from fxquant.graph.dialect import aten, op_kind
from fxquant.graph.nodes import constant, data_users, get_parameter, rank
from fxquant.graph.rewrite import add_constant, emit, replace_constant
from fxquant.rotation.flow import Carrier, Flow, bias_before_weight, norm_parameters
from fxquant.rotation.layout import Layout


@torch.no_grad()
def turn_streams(gm: fx.GraphModule, flow: Flow, rotations: Mapping[int, Tensor]) -> None:
    """Rotates streams; the function of the graph is unchanged.

    Parameters are replaced and never written to, since other nodes may share them. New parameters
    are computed in float64 and stored in the type of the old ones.

    Args:
        gm: edited in place; the caller removes dead nodes and parameters.
        flow: its streams.
        rotations: number of each stream to rotate -> orthogonal matrix ``(width, width)`` in
            float64.
    """
    _Turner(gm, flow, rotations).run()


class _Turner:
    def __init__(self, gm: fx.GraphModule, flow: Flow, rotations: Mapping[int, Tensor]) -> None:
        self._gm, self._flow, self._rotations = gm, flow, rotations
        # Weight and bias of each norm that are folded into its readers, and of each product.
        self._folded: dict[fx.Node, tuple[Tensor, Tensor]] = {}
        self._products: dict[fx.Node, tuple[Tensor, Tensor | None]] = {}

    def run(self) -> None:
        """Rotates everything that the streams touch."""
        flow = self._flow
        for norm, reader in flow.norms.items():
            if self._is_rotated(reader.carrier.stream) or self._is_rotated(reader.entry):
                self._clear_norm(norm)
        for node, carrier in flow.consumers:
            if self._is_rotated(carrier.stream):
                self._turn_columns(node, carrier)
        producers = {node: s for node, s in flow.producers.items() if self._is_rotated(s)}
        scales = [scale for scale in flow.scales if scale.product in producers]
        for scale in scales:
            self._transform_rows(scale.product, torch.diag(scale.factor.double()))
        for node, stream in producers.items():
            self._transform_rows(node, self._matrix(stream))
        self._write_products()
        self._add_linears()
        for node, carrier in flow.constants.items():
            if self._is_rotated(carrier.stream):
                self._turn_constant(node, carrier)
        for scale in scales:
            scale.node.replace_all_uses_with(scale.value)

    def _is_rotated(self, stream: int | None) -> bool:
        return stream is not None and self._flow.stream(stream) in self._rotations

    def _matrix(self, stream: int, copies: int = 1) -> Tensor:
        """The rotation of a value's channels, where its stream is rotated."""
        matrix = self._rotations[self._flow.stream(stream)]
        blocks = torch.eye(copies, dtype=matrix.dtype)
        return torch.kron(blocks, matrix).to(device_of(self._gm))

    def _clear_norm(self, norm: fx.Node) -> None:
        """Takes weight and bias out of a norm, to fold them into its readers."""
        reader = self._flow.norms[norm]
        weight, bias = norm_parameters(self._gm, norm)
        remaining = torch.zeros_like(bias)
        exact = all(carrier.shift_exact for _, carrier in self._flow.readers_of(norm))
        if reader.entry is None and bool(bias.any()) and not exact:
            before = bias_before_weight(weight, bias)
            assert before is not None, f"{norm.name}: its weight is too small to keep its bias"
            remaining = self._matrix(reader.carrier.stream, reader.carrier.layout.copies) @ before
            bias = torch.zeros_like(bias)
        self._folded[norm] = (weight, bias)
        values = {2: torch.ones_like(weight), 3: remaining}
        for index, old in list(enumerate(norm.args))[2:4]:
            if isinstance(old, fx.Node):
                name = f"{norm.name}_{('weight', 'bias')[index - 2]}"
                value = values[index].to(get_parameter(self._gm, old).dtype)
                replace_constant(self._gm, norm, old, value, name)

    def _of_product(self, node: fx.Node) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a product as rotated so far, in float64."""
        if node not in self._products:
            weight, bias = get_parameter(self._gm, node.args[1]), None  # type: ignore[arg-type]
            if len(node.args) > 2:
                bias = constant(self._gm, node.args[2])
            self._products[node] = (weight.double(), None if bias is None else bias.double())
        return self._products[node]

    def _turn_columns(self, node: fx.Node, carrier: Carrier) -> None:
        """Undoes a rotation, and applies the weight and bias of a norm, in a consumer."""
        weight, bias = self._of_product(node)
        axis = 1 if op_kind(node) is not None else 0  # a transposed convolution has inputs first
        columns = weight.movedim(axis, -1)
        scale, shift = self._affine(carrier)
        if bool(shift.any()):
            added = columns @ shift
            added = added.flatten(1).sum(1) if added.ndim > 1 else added
            bias = added if bias is None else bias + added
        matrix = self._matrix(carrier.stream, carrier.layout.copies)
        columns = (columns * scale) @ matrix.T
        self._products[node] = (columns.movedim(-1, axis), bias)

    def _affine(self, carrier: Carrier) -> tuple[Tensor, Tensor]:
        """Weight and bias of the norm that a value comes from, ones and zeros without a norm."""
        size = carrier.layout.size
        if carrier.norm is None:
            ones = torch.ones(size, dtype=torch.float64, device=device_of(self._gm))
            return ones, torch.zeros_like(ones)
        weight, bias = self._folded[carrier.norm]
        return weight.repeat(size // len(weight)), bias.repeat(size // len(bias))

    def _transform_rows(self, node: fx.Node, matrix: Tensor) -> None:
        """Multiplies the output channels of a producer by a matrix."""
        weight, bias = self._of_product(node)
        rows = (matrix @ weight.flatten(1)).view_as(weight)
        self._products[node] = (rows, None if bias is None else matrix @ bias)

    def _write_products(self) -> None:
        for node, (weight, bias) in self._products.items():
            dtype = get_parameter(self._gm, node.args[1]).dtype  # type: ignore[arg-type]
            with self._gm.graph.inserting_before(node):
                parameters: list[Any] = [
                    add_constant(self._gm, value.to(dtype), f"{node.name}_{name}", like=node)
                    for name, value in (("weight", weight), ("bias", bias))
                    if value is not None
                ]
            node.args = (node.args[0], *parameters, *node.args[1 + len(parameters) :])

    def _turn_constant(self, node: fx.Node, carrier: Carrier) -> None:
        value, layout = get_parameter(self._gm, node), carrier.layout
        matrix = self._matrix(carrier.stream, layout.copies)
        turned = (value.double().movedim(layout.axis, -1) @ matrix.T).movedim(-1, layout.axis)
        reader = min(node.users)  # the first in the graph
        with self._gm.graph.inserting_before(reader):
            name = f"{node.name}_rotated"
            new = add_constant(self._gm, turned.to(value.dtype), name, like=reader)
        node.replace_all_uses_with(new)

    def _add_linears(self) -> None:
        """Rotates entries, and undoes rotations at exits, by linears."""
        flow = self._flow
        for node, (carrier, readers) in flow.exits.items():
            if self._is_rotated(carrier.stream):
                scale, shift = self._affine(carrier)
                matrix = self._matrix(carrier.stream, carrier.layout.copies).T * scale[:, None]
                self._insert(node, carrier.layout, matrix, shift, readers, "unrotated")
        entries: dict[tuple[fx.Node, int], tuple[Layout, list[fx.Node]]] = {}
        for node, carrier, reader_node in flow.entries:
            key = (node, flow.stream(carrier.stream))
            entries.setdefault(key, (carrier.layout, []))[1].append(reader_node)
        for (node, stream), (layout, readers) in entries.items():
            if self._is_rotated(stream):
                matrix = self._matrix(stream, layout.copies)
                self._insert(node, layout, matrix, torch.zeros(1), readers, "rotated")
        for norm, reader in flow.norms.items():
            if norm in self._folded and reader.entry is not None:
                self._add_norm_linear(norm, reader.carrier, reader.entry)

    def _add_norm_linear(self, norm: fx.Node, carrier: Carrier, entry: int) -> None:
        """Applies a norm's weight and bias behind it, from the rotation before to that behind."""
        scale, shift = self._folded[norm]
        matrix = torch.diag(scale)
        if self._is_rotated(carrier.stream):
            matrix = matrix @ self._matrix(carrier.stream, carrier.layout.copies).T
        if self._is_rotated(entry):
            matrix, shift = self._matrix(entry) @ matrix, self._matrix(entry) @ shift
        layout = Layout(carrier.layout.size, carrier.layout.axis)
        self._insert(norm, layout, matrix, shift, data_users(norm), "rotated")

    def _insert(
        self,
        node: fx.Node,
        layout: Layout,
        matrix: Tensor,
        shift: Tensor,
        readers: list[fx.Node],
        suffix: str,
    ) -> None:
        """Feeds readers of a value from a linear over its channels."""
        gm, last = self._gm, rank(node) - 1
        dtype = node.meta["val"].dtype
        with gm.graph.inserting_before(min(readers)):
            order = [axis for axis in range(last + 1) if axis != layout.axis] + [layout.axis]
            moved = layout.axis != last
            value = emit(gm, aten.permute.default, node, order, like=node) if moved else node
            name = f"{node.name}_{suffix}_weight"
            parameters = [add_constant(gm, matrix.to(dtype), name, like=node)]
            if bool(shift.any()):
                name = f"{node.name}_{suffix}_bias"
                parameters.append(add_constant(gm, shift.to(dtype), name, like=node))
            result = emit(gm, aten.linear.default, value, *parameters, like=node)
            result._rename(f"{node.name}_{suffix}")
            if moved:
                back = [order.index(axis) for axis in range(last + 1)]
                result = emit(gm, aten.permute.default, result, back, like=node)
        for reader in readers:
            reader.replace_input_with(node, result)
