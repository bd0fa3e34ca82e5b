"""Examination of a QDQ file: onnxruntime's kernels, float products, and correct results."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from fxquant.backends.onnx_qdq.difference import Difference, Outputs, compare
from fxquant.backends.onnx_qdq.packing import packed_type
from fxquant.backends.onnx_qdq.runtime import Unfused, inspect, make_session, read_model
from fxquant.backends.onnx_qdq.target import u8s8_saturates
from fxquant.errors import FileFormatError
from fxquant.utils.files import as_path

# Batch size, and size of every other open axis, of random inputs.
_OPEN_SIZE = 2
_FLOAT_TYPES = {
    "tensor(float16)": np.float16,
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
}
_INTEGER_TYPES = {
    "tensor(bool)": np.bool_,
    **{
        f"tensor({sign}int{bits})": getattr(np, f"{sign}int{bits}")
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
}


@dataclass(frozen=True, kw_only=True)
class DoctorReport:
    """Findings about a QDQ file.

    Attributes:
        path: the file.
        file_bytes: size of the file.
        opset: version of the default operator set, 0 where the file uses none of its operators.
        quantizers: numbers of QuantizeLinear and DequantizeLinear nodes in the file.
        stored: type of quantized constants -> number of values; ``packed int6`` are codes that
            fxquant stores at a width of 6 bits and onnxruntime unpacks into bytes.
        fused: integer kernel -> number of nodes that run on the kernel.
        unfused: products that run in float, with reasons.
        difference: difference of the outputs between graph optimizations on and off.
        saturates: whether the file has int8 right operands and this CPU's uint8 x int8 product
            overflows.
    """

    path: Path
    file_bytes: int
    opset: int
    quantizers: tuple[int, int]
    stored: dict[str, int]
    fused: dict[str, int]
    unfused: tuple[Unfused, ...]
    difference: Difference
    saturates: bool

    @property
    def ok(self) -> bool:
        """Whether graph optimizations leave the outputs unchanged up to rounding."""
        return self.difference.ok

    def __str__(self) -> str:
        """The findings as several lines of text."""
        kernels = ", ".join(f"{count} {name}" for name, count in sorted(self.fused.items()))
        stored = ", ".join(f"{count:,} {name}" for name, count in sorted(self.stored.items()))
        lines = [
            f"{self.path}: {self.file_bytes / 1e6:.2f} MB, opset {self.opset or 'none'}, "
            f"{self.quantizers[0]} QuantizeLinear, {self.quantizers[1]} DequantizeLinear",
            f"quantized constants: {stored or 'none'}",
            f"integer kernels: {kernels or 'none'}",
        ]
        lines += [f"float: {item.node} ({item.op}): {item.reason}" for item in self.unfused]
        verdict = "ok" if self.ok else "WRONG: do not deploy this file on this CPU"
        lines.append(f"optimizations on and off differ by {self.difference}: {verdict}")
        if self.saturates:
            lines.append(
                "this CPU has no VNNI: its uint8 x int8 product overflows 16 bits. Export with "
                "target x86-avx2, or set session.x64quantprecision=1"
            )
        return "\n".join(lines)


def doctor(path: str | Path, images: NDArray[np.float32] | None = None) -> DoctorReport:
    """Examines a QDQ file, written by fxquant or by any other tool.

    Args:
        path: an ONNX file.
        images: data for the first input, ``(B, …)``; random numbers if None.

    Raises:
        FileFormatError: the file is truncated, not ONNX, or does not run on the data.
        PathTypeError: ``path`` is neither text nor a path.
    """
    path = as_path(path, "path")
    model = read_model(path)
    fused, unfused = inspect(path)
    nodes = Counter(node.op_type for node in model.graph.node)
    stored = _stored(model)
    return DoctorReport(
        path=path,
        file_bytes=path.stat().st_size,
        opset=max(
            (e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), default=0
        ),
        quantizers=(nodes["QuantizeLinear"], nodes["DequantizeLinear"]),
        stored=stored,
        fused=fused,
        unfused=unfused,
        difference=optimization_difference(path, images),
        saturates=_has_int8(model, stored) and u8s8_saturates(),
    )


def optimization_difference(path: Path, images: NDArray[np.float32] | None = None) -> Difference:
    """Difference of the outputs between graph optimizations on and off.

    Args:
        path: an ONNX file.
        images: data for the first input; random numbers if None.

    Raises:
        FileFormatError: the model does not run on the data.
    """
    fast, plain = (make_session(path, optimize=optimize) for optimize in (True, False))
    feeds = _feeds(plain, images)

    def run(session: ort.InferenceSession, changed: dict[str, NDArray[np.generic]]) -> Outputs:
        try:
            return session.run(None, feeds | changed)  # type: ignore[no-any-return]
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            shapes = {name: value.shape for name, value in feeds.items()}
            advice = _advice(session) if images is None else ""
            raise FileFormatError(
                f"{path} does not run on inputs of shape {shapes}: {str(error)[:200]}{advice}",
                got=path,
            ) from error

    name = next(iter(feeds), "")
    first = feeds.get(name, np.zeros(0, np.bool_))
    return compare(run(fast, {}), run(plain, {}), first, lambda x: run(plain, {name: x}))


def _advice(session: ort.InferenceSession) -> str:
    """Advice where random inputs may have wrong sizes; empty where only the batch is open."""
    open_axes = [
        f"{entry.name}, axis {axis}"
        for entry in session.get_inputs()
        for axis, size in enumerate(entry.shape)
        if axis > 0 and not (isinstance(size, int) and size > 0)
    ]
    if not open_axes:
        return ""
    return (
        f". The file leaves sizes open ({'; '.join(open_axes)}), for which {_OPEN_SIZE} was taken: "
        "give images of the right size, on the command line with --data"
    )


def _feeds(
    session: ort.InferenceSession, images: NDArray[np.float32] | None
) -> dict[str, NDArray[np.generic]]:
    random = np.random.default_rng(0)
    feeds: dict[str, NDArray[np.generic]] = {}
    for i, entry in enumerate(session.get_inputs()):
        shape = [size if isinstance(size, int) and size > 0 else _OPEN_SIZE for size in entry.shape]
        if i == 0 and images is not None:
            feeds[entry.name] = images.astype(_FLOAT_TYPES.get(entry.type, images.dtype))
        elif entry.type in _FLOAT_TYPES:
            feeds[entry.name] = random.standard_normal(shape).astype(_FLOAT_TYPES[entry.type])
        elif entry.type in _INTEGER_TYPES:
            feeds[entry.name] = np.ones(shape, _INTEGER_TYPES[entry.type])
        else:
            known = ", ".join((*_FLOAT_TYPES, *_INTEGER_TYPES))
            raise FileFormatError(
                f"input {entry.name} is a {entry.type}, for which doctor has no values; to run the "
                f"file, the type must be one of {known}",
                edge=entry.name,
                got=entry.type,
                expected=(*_FLOAT_TYPES, *_INTEGER_TYPES),
            )
    return feeds


def _stored(model: onnx.ModelProto) -> dict[str, int]:
    """Counts, by type, the values of the constants that DequantizeLinear nodes read."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    read = {n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    counts: Counter[str] = Counter()
    for kind, count in filter(None, map(packed_type, model.graph.node)):
        counts[f"packed {kind}"] += count
    for name in read & set(constants):
        tensor = constants[name]
        kind = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
        counts[kind] += int(np.prod(tensor.dims))
    return dict(counts)


def _has_int8(model: onnx.ModelProto, stored: dict[str, int]) -> bool:
    """Whether a right operand may use all 8 bits of int8, which packed operands do not."""
    constants = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    zeros = (n.input[2:] for n in model.graph.node if n.op_type == "QuantizeLinear")
    computed = {constants.get(name) for names in zeros for name in names}
    return "int8" in stored or onnx.TensorProto.INT8 in computed
