"""Sessions of onnxruntime, and inspection of the kernels that onnxruntime chose for a model."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime as ort

from fxquant.errors import FileFormatError
from fxquant.utils.files import as_path

PROVIDERS = ["CPUExecutionProvider"]
# Kernels that multiply integer codes.
INTEGER_KERNELS = frozenset(
    {
        "QLinearMatMul",
        "MatMulIntegerToFloat",
        "QGemm",
        "QLinearConv",
        "MatMulInteger",
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulNBits",
    }
)
FLOAT_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "FusedMatMul", "FusedGemm", "FusedConv"})


@dataclass(frozen=True)
class Unfused:
    """A product that onnxruntime runs in float.

    Attributes:
        node: name of the product's node.
        op: operator of the node.
        reason: a clause on why it runs in float.
    """

    node: str
    op: str
    reason: str


def make_session(
    path: str | Path,
    threads: int | None = None,
    *,
    optimize: bool = True,
    optimized_to: Path | None = None,
) -> ort.InferenceSession:
    """Opens a model on the CPU.

    Args:
        path: an ONNX file.
        threads: number of threads of one operator; None: onnxruntime's choice.
        optimize: whether to run graph optimizations.
        optimized_to: path to which the optimized graph is written.

    Raises:
        FileFormatError: onnxruntime cannot load the file.
        PathTypeError: ``path`` is neither text nor a path.
    """
    path = as_path(path, "path")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized_to is not None:
        # Layouts for particular hardware, which this level omits, would hide the operators; such
        # layouts do not change quantized products.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(optimized_to)
    # Exact numbers for weight-only nodes: level 4 would quantize their activations too.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    try:
        return ort.InferenceSession(str(path), options, providers=PROVIDERS)
    except Exception as error:  # onnxruntime's exceptions share no base but Exception
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise FileFormatError(
            f"onnxruntime cannot load {path}: {_first_line(error)}. The file is truncated, not "
            "ONNX, or needs operators that onnxruntime does not have",
            got=path,
        ) from error


def _first_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error))[:300]


def read_model(path: Path) -> onnx.ModelProto:
    """Reads and checks an ONNX file.

    Raises:
        FileFormatError: the file is missing, truncated or not an ONNX model.
    """
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except OSError as error:
        raise FileFormatError(f"cannot read {path}: {error.strerror or error}", got=path) from error
    except Exception as error:  # protobuf's DecodeError and the checker's share no base
        raise FileFormatError(
            f"{path} is not a valid ONNX model ({_first_line(error)}): truncated or of another "
            "format",
            got=path,
        ) from error
    if not model.graph.node:
        raise FileFormatError(
            f"{path} holds an empty graph: truncated or of another format", got=path
        )
    return model


def inspect(path: Path) -> tuple[dict[str, int], tuple[Unfused, ...]]:
    """Inspects which products onnxruntime runs on integer kernels, and which in float.

    Returns:
        Integer kernel -> number of nodes; the products that run in float, with reasons.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        make_session(path, optimized_to=optimized)
        model = onnx.load(str(optimized))
    counts = Counter(n.op_type for n in model.graph.node if n.op_type in INTEGER_KERNELS)
    return dict(counts), tuple(_unfused(model))


def _unfused(model: onnx.ModelProto) -> list[Unfused]:
    producers = {output: node for node in model.graph.node for output in node.output}
    types = {t.name: t.data_type for t in model.graph.initializer}
    unfused = []
    for node in model.graph.node:
        if node.op_type in FLOAT_PRODUCTS:
            sources = [producers.get(name) for name in node.input[:2]]
            unfused.append(Unfused(node.name, node.op_type, _reason(node, sources, types)))
    return unfused


def _reason(
    node: onnx.NodeProto, sources: list[onnx.NodeProto | None], types: dict[str, int]
) -> str:
    quantized = [s is not None and s.op_type == "DequantizeLinear" for s in sources]
    if not any(quantized):
        return "both operands are float"
    if not all(quantized):
        return f"operand {quantized.index(False) + 1} is float"
    # The zero_point has the type of the codes and, unlike them, is always a constant.
    codes = [types.get(s.input[2]) for s in sources if s is not None and len(s.input) > 2]
    if {onnx.TensorProto.INT16, onnx.TensorProto.UINT16} & set(codes):
        return "16-bit codes have no integer kernel"
    if codes[:1] == [onnx.TensorProto.INT8]:
        return "int8 activations: x86 kernels need uint8 activations"
    if node.op_type.endswith("Conv"):
        return "an integer convolution needs a quantized output, and this one's is float"
    return "onnxruntime has no integer kernel for this combination of types, axes and consumers"
