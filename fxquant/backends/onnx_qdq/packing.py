"""Packs weight codes of 2 to 7 bits, so that a file stores them at their width.

    before: DequantizeLinear(codes, …)               codes: int8 or uint8, a byte a code
    after:  DequantizeLinear(UnpackInt6(packed), …)  packed: uint8, 6 bytes for 8 codes

``UnpackInt6`` is a function in the file, made of standard operators and shared by all weights of
that type. onnxruntime inlines and computes the function when it makes the session, so that the int8
and uint8 kernels get the same codes as from a file with one byte for each code.

A code is cut into pieces of 4, 2 and 1 bits, as its width needs: 6 bits are 4 and 2. A byte holds
pieces of one width, and a table maps each byte to the values of its pieces, the sign included; a
code is the bitwise or of its pieces. onnxruntime keeps the output of each operator until the
session is made, and a table needs the fewest operators.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

DOMAIN, DOMAIN_VERSION = "fxquant", 1
# Names of the functions are such as UnpackInt6 and UnpackInt6Filled.
_FUNCTION_PREFIX, _FILLED_SUFFIX = "Unpack", "Filled"


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Piece of a code: bits that are stored together.

    Attributes:
        width: number of bits, 4, 2 or 1.
        offset: position of the lowest of these bits in the code.
    """

    width: int
    offset: int

    @property
    def places(self) -> NDArray[np.uint8]:
        """Lowest bits of the pieces of a byte, ``(2,)``, ``(2, 2)`` or ``(2, 2, 2)``."""
        axes = {4: 1, 2: 2, 1: 3}[self.width]
        return np.arange(0, 8, self.width, dtype=np.uint8).reshape([2] * axes)

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """Shape of the bytes that hold the pieces of ``(n, 2, 2, 2)`` codes."""
        return (-1, *[2] * (3 - self.places.ndim))

    @property
    def mask(self) -> np.uint8:
        """Mask of the piece's bits, at the lowest position."""
        return np.uint8((1 << self.width) - 1)


def _pieces(bits: int) -> list[_Piece]:
    widths = [width for width in (4, 2, 1) if bits & width]
    return [_Piece(width=width, offset=sum(widths[:i])) for i, width in enumerate(widths)]


def pack(codes: NDArray[np.int8 | np.uint8], bits: int) -> NDArray[np.uint8]:
    """Packs codes into the bytes that the functions of the file unpack.

    Args:
        codes: codes of any shape, in the range of their width.
        bits: width of the codes, 2 to 7.

    Returns:
        Bytes ``(bits, n)``, n being an eighth of the number of codes, rounded up; each piece fills
        as many rows as it has bits.
    """
    n = -(-codes.size // 8)
    flat = np.zeros(8 * n, np.uint8)
    flat[: codes.size] = codes.reshape(-1).view(np.uint8)
    rows = []
    for piece in _pieces(bits):
        pieces = ((flat >> piece.offset) & piece.mask).reshape(-1, 8 // piece.width)
        shifted = pieces << piece.places.reshape(-1)
        rows.append(np.bitwise_or.reduce(shifted, axis=1).reshape(piece.width, n))
    return np.concatenate(rows)


def _table(piece: _Piece, bits: int, *, signed: bool) -> NDArray[np.int8 | np.uint8]:
    """Values of the pieces of each byte, ``(256, 2, …)``, in the order of the pieces in a byte."""
    byte = np.arange(256, dtype=np.uint8).reshape(-1, *[1] * piece.places.ndim)
    values = ((byte >> piece.places) & piece.mask).astype(np.int64) << piece.offset
    if not signed:
        return values.astype(np.uint8)
    negative = values >> (bits - 1)  # 1 where the piece holds the sign and it is set
    return (values - (negative << bits)).astype(np.int8)


def pack_weights(model: ir.Model, widths: Mapping[str, int]) -> dict[int, int]:
    """Packs the initializers of weight codes in place.

    Args:
        model: a QDQ model.
        widths: name of an initializer -> bits of its codes. Where the model has no initializer of
            that name, the exporter has merged it with an equal one.

    Returns:
        Bits -> number of codes packed.
    """
    packed: Counter[int] = Counter()
    for name, bits in widths.items():
        if bits < 8 and name in model.graph.initializers:
            packed[bits] += _pack_weight(model, name, bits)
    return dict(packed)


def _pack_weight(model: ir.Model, name: str, bits: int) -> int:
    """Packs one initializer and returns the number of its codes."""
    codes = model.graph.initializers.pop(name)
    assert codes.const_value is not None
    values = codes.const_value.numpy()
    function = _unpacker(
        bits,
        signed=values.dtype == np.int8,
        filled=values.size % 8 > 0,
        opset=model.graph.opset_imports[""],
    )
    if function.identifier() not in model.functions:
        model.functions[function.identifier()] = function
        model.graph.opset_imports[DOMAIN] = DOMAIN_VERSION
    packed = ir.Value(name=f"{name}_packed", const_value=ir.tensor(pack(values, bits)))
    node = ir.node(function.name, [packed], {"shape": list(values.shape)}, domain=DOMAIN)
    codes.replace_all_uses_with(node.outputs[0])
    node.outputs[0].name = name
    model.graph.initializers.add(packed)
    model.graph.insert_before(model.graph[0], node)
    return int(values.size)


def packed_type(node: onnx.NodeProto) -> tuple[str, int] | None:
    """Type and number of the codes that a node unpacks; None for nodes of other kinds."""
    if node.domain != DOMAIN or not node.op_type.startswith(_FUNCTION_PREFIX):
        return None
    kind = node.op_type.removeprefix(_FUNCTION_PREFIX).removesuffix(_FILLED_SUFFIX).lower()
    (shape,) = (a.ints for a in node.attribute if a.name == "shape")
    return kind, math.prod(shape)


def _unpacker(bits: int, *, signed: bool, filled: bool, opset: int) -> ir.Function:
    """Makes the function that maps packed bytes to int8 or uint8 codes of the node's ``shape``.

    Args:
        bits: width of the codes.
        signed: whether the codes are int8; otherwise uint8.
        filled: whether the last bytes are filled up beyond the number of codes.
        opset: version of the standard operators.
    """
    tape = ir.tape.Tape()

    def call(op: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        return tape.op(op, list(inputs), attributes)

    def constant(value: NDArray[np.generic]) -> ir.Value:
        return tape.op("Constant", [], {"value": ir.tensor(value)})

    def integers(*values: int) -> ir.Value:
        return constant(np.array(values, np.int64))

    packed, pieces = ir.Value(name="packed"), _pieces(bits)
    sizes = integers(*(piece.width for piece in pieces))
    rows = tape.op_multi_out("Split", [packed, sizes], {"axis": 0}, num_outputs=len(pieces))
    codes: ir.Value | None = None
    for row, piece in zip(rows, pieces, strict=True):
        table = constant(_table(piece, bits, signed=signed))
        numbers = call(
            "Cast", call("Reshape", row, integers(*piece.packed_shape)), to=ir.DataType.INT32
        )
        piece_codes = call("Gather", table, numbers)
        codes = piece_codes if codes is None else call("BitwiseOr", codes, piece_codes)
    assert codes is not None
    shape = tape.op(
        "Constant", [], {"value_ints": ir.RefAttr("value_ints", "shape", ir.AttributeType.INTS)}
    )
    if filled:
        codes = call("Reshape", codes, integers(-1))
        codes = call("Slice", codes, integers(0), call("ReduceProd", shape))
    codes = call("Reshape", codes, shape)
    codes.name = "codes"
    return ir.Function(
        DOMAIN,
        f"{_FUNCTION_PREFIX}{'Int' if signed else 'UInt'}{bits}{_FILLED_SUFFIX if filled else ''}",
        graph=ir.Graph([packed], [codes], nodes=tape.nodes, opset_imports={"": opset}),
        attributes=[ir.Attr("shape", ir.AttributeType.INTS, None)],
    )
