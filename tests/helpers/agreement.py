"""Does onnxruntime compute what the simulation does, and where not, is it a rounding tie?

Every quantizer of every image is looked at by itself: both sides get onnxruntime's own values in
all places before it (teacher forcing), so that a tie there cannot hide or excuse what comes after.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from fxquant import CompiledModel
from fxquant.config.vocabulary import Arg
from fxquant.graph.edges import quantized_edges
from fxquant.graph.nodes import submodule
from fxquant.quantizers import (
    DynamicFocusingQuantizer,
    LogQuantizer,
    TwinUniformQuantizer,
    UniformQuantizer,
)
from fxquant.quantizers.ops import twin_threshold
from tests.helpers.ties import IntegerQuantizer, from_tie, places

# How far from a rounding tie float32 arithmetic in another order may move a value, in steps.
NEAR_TIE = 2e-3
# The same for one division, the step numbers being up to 255.
NEAR_TIE_OF_QUOTIENT = 1e-4


@dataclass(frozen=True)
class Exported:
    """One QuantizeLinear of a file: its input where it was asked for, and its stored codes."""

    name: str
    reads: str
    scale_name: str
    source: NDArray[np.float32] | None
    scale: NDArray[np.float32]
    zero_point: NDArray[np.generic]
    codes: NDArray[np.int64]

    @property
    def values(self) -> Tensor:
        """What the codes stand for, float32."""
        steps = torch.from_numpy(self.codes - int(self.zero_point)).float()
        return steps * float(self.scale)

    def other_type_of(self, other: Exported) -> bool:
        """Whether both store the same steps of the same value, signed and unsigned."""
        same = (self.reads, self.scale_name) == (other.reads, other.scale_name)
        return same and self.zero_point.dtype != other.zero_point.dtype


def exported_codes(path: Path, images: Tensor, *, sources: bool = False) -> list[Exported]:
    """What every QuantizeLinear of a file gives, in order, graph optimizations on.

    Args:
        path: the file.
        images: its input.
        sources: also what they take. An output more keeps a value that kernels fused with the
            quantizer would never write, so without it the kernels are those of deployment.
    """
    model = onnx.load(str(path))
    nodes = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    given = model.graph.input[0].name
    wanted = {node.output[0]: constants[node.input[2]].data_type for node in nodes}
    if sources:
        wanted |= {n.input[0]: TensorProto.FLOAT for n in nodes if n.input[0] != given}
    present = {output.name for output in model.graph.output}
    for name, kind in wanted.items():
        if name not in present:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    results = dict(zip(wanted, session.run(list(wanted), {given: images.numpy()}), strict=True))
    results[given] = images.numpy()
    return [
        Exported(
            name=node.name,
            reads=node.input[0],
            scale_name=node.input[1],
            source=results[node.input[0]] if sources else None,
            scale=numpy_helper.to_array(constants[node.input[1]]),
            zero_point=numpy_helper.to_array(constants[node.input[2]]),
            codes=results[node.output[0]].astype(np.int64),
        )
        for node in nodes
    ]


def activation_quantizers(model: CompiledModel) -> list[tuple[str, IntegerQuantizer]]:
    """The quantizers of activations with their names, in graph order."""
    gm = model.graph_module
    weights = {str(edge.source.target) for edge in quantized_edges(gm) if edge.arg is Arg.WEIGHT}
    found = []
    for node in gm.graph.nodes:
        module = submodule(gm, node)
        if module is not None and str(node.target) not in weights:
            assert isinstance(module, IntegerQuantizer)
            found.append((str(node.target), module))
    return found


def assert_same_codes(model: CompiledModel, path: Path, images: Tensor) -> int:
    """Checks that codes differ by rounding ties alone.

    The codes of each QuantizeLinear must be those of its input; and those that the simulation
    gives, its quantizers replaced by onnxruntime's, may differ by one value within NEAR_TIE steps
    of a tie, at fewer than one in a thousand places.

    Returns:
        Number of codes that differ.
    """
    for item in exported_codes(path, images, sources=True):
        _assert_exact(item)
    exported, quantizers = exported_codes(path, images), activation_quantizers(model)
    differing: dict[str, int] = {}

    def force(name: str, items: list[Exported]):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            assert isinstance(module, IntegerQuantizer)
            assert tuple(output.shape) == items[0].codes.shape, f"{name} is not {items[0].name}"
            theirs, own = _codes(module, items, args[0]), module.quantize(args[0])
            difference = places(module, theirs) - places(module, own)
            assert name not in differing, f"{name} runs twice"
            distance = from_tie(module, args[0], own, theirs)
            differing[name] = _count_ties(name, difference, distance, NEAR_TIE)
            return module.dequantize(theirs)

        return hook

    handles = [
        module.register_forward_hook(force(name, _take(module, exported)))
        for name, module in quantizers
    ]
    assert not exported
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    assert len(differing) == len(quantizers)
    return sum(differing.values())


def _take(quantizer: IntegerQuantizer, exported: list[Exported]) -> list[Exported]:
    """Takes the QuantizeLinears of a quantizer from the front: two of a twin, else one.

    Another of the same value and scale, stored as the other type, stands behind a uniform one that
    products read on both sides: CPUs with VNNI want their right operands signed.
    """
    if isinstance(quantizer, TwinUniformQuantizer):
        return [exported.pop(0), exported.pop(0)]
    first = exported.pop(0)
    if exported and first.other_type_of(exported[0]):
        exported.pop(0)
    return [first]


def _codes(quantizer: IntegerQuantizer, items: list[Exported], x: Tensor) -> Tensor:
    """The quantizer's codes that stand for what onnxruntime's QuantizeLinears gave.

    Args:
        quantizer: of the simulation.
        items: its QuantizeLinears.
        x: its input, which tells the region where either side has a value in float.
    """
    assert not isinstance(quantizer, LogQuantizer), "none is exported"
    if isinstance(quantizer, DynamicFocusingQuantizer):
        return items[0].values.div(quantizer.scale).round() - quantizer.start
    if isinstance(quantizer, UniformQuantizer):
        codes = items[0].codes - _storage_shift(items[0], quantizer)
        return torch.from_numpy(codes).to(x.dtype)
    one, other = items
    if quantizer.grid_size <= 256:  # the coarse values, then all values
        values = other.values
    elif other.scale_name.endswith("_coarse_scale"):  # values in float
        steps = twin_threshold(quantizer.shift, quantizer.bits)
        border = 0.0 if quantizer.two_sided else quantizer.scale * steps
        values = torch.where(x > border, other.values, one.values)
    else:  # two products
        assert not bool(((one.values != 0) & (other.values != 0)).any())
        values = one.values + other.values
    codes = quantizer.quantize(values)
    assert torch.equal(quantizer.dequantize(codes), values), "a value that is none of the twin's"
    return codes


def _assert_exact(item: Exported) -> None:
    """Checks that codes are ``round(x / scale) + zero_point`` of the input onnxruntime had."""
    steps = torch.from_numpy(np.asarray(item.source / item.scale))
    limits = np.iinfo(item.zero_point.dtype)
    codes = (steps.round() + int(item.zero_point)).clamp(limits.min, limits.max)
    difference = torch.from_numpy(item.codes) - codes
    distance = ((steps - steps.floor()) - 0.5).abs()
    _count_ties(f"{item.name}'s own rounding", difference, distance, NEAR_TIE_OF_QUOTIENT)


def _count_ties(name: str, difference: Tensor, distance: Tensor, near: float) -> int:
    """Number of differences, once they are seen to be few and within ``near`` of a tie."""
    wrong = difference != 0
    count = int(wrong.sum())
    if count:
        assert difference.abs().max() == 1, f"{name}: a code is off by {difference.abs().max()}"
        furthest = distance[wrong].max()
        assert furthest < near, f"{name}: {furthest:.1e} steps from a tie"
        assert count <= max(2, 1e-3 * wrong.numel()), f"{name}: {count} ties"
    return count


def _storage_shift(item: Exported, quantizer: UniformQuantizer) -> int:
    """What was added to codes to store them: half their range where signedness differs."""
    signed = bool(np.iinfo(item.zero_point.dtype).min < 0)
    return (int(quantizer.signed) - int(signed)) << (quantizer.bits - 1)
