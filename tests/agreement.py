"""Does another runtime compute what the simulation does, and where not, is it a rounding tie?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fxquant import CompiledModel
from fxquant.graph import quantized_edges, submodule
from fxquant.quantizers import UniformQuantizer
from fxquant.spec import Arg

# How far from a rounding tie float32 arithmetic in another order may move a value, in steps.
NEAR_TIE = 2e-3


@dataclass(frozen=True)
class Observed:
    """What reached one activation quantizer of the simulation, and the codes it gave."""

    name: str
    steps: Tensor
    codes: Tensor


def simulated_codes(model: CompiledModel, images: Tensor) -> list[Observed]:
    """Inputs, in steps of their scale, and codes of the activation quantizers, in graph order."""
    gm, seen = model.graph_module, dict[str, Observed]()
    weights = {str(edge.source.target) for edge in quantized_edges(gm) if edge.arg is Arg.WEIGHT}

    def hook(name: str):
        def record(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            assert isinstance(module, UniformQuantizer)
            scale = module.scale
            if module.axis is not None:
                shape = [1] * args[0].ndim
                shape[module.axis] = -1
                scale = scale.view(shape)
            seen[name] = Observed(name, args[0] / scale, module.quantize(args[0]) - module.qmin)

        return record

    handles, order = [], []
    for node in gm.graph.nodes:
        module = submodule(gm, node)
        if module is not None and str(node.target) not in weights:
            handles.append(module.register_forward_hook(hook(str(node.target))))
            order.append(str(node.target))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return [seen[name] for name in order]


def onnx_codes(path: Path, images: Tensor) -> list[NDArray[np.int64]]:
    """Output of every QuantizeLinear of a file in order, counted from the smallest code."""
    model = onnx.load(str(path))
    nodes = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    points = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in nodes:
        kind = points[node.input[2]]
        model.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], kind, None))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [node.output[0] for node in nodes]
    results = session.run(names, {session.get_inputs()[0].name: images.numpy()})
    return [r.astype(np.int64) for r in results]


def assert_same_codes(model: CompiledModel, path: Path, images: Tensor) -> int:
    """Checks that codes differ by rounding ties alone.

    For each image, the first quantizer whose codes differ must differ by one, and only at values
    within NEAR_TIE steps of a tie: all before it being equal, nothing but float rounding can have
    moved them. What follows from such a difference is not looked at.

    Returns:
        Number of images with a difference anywhere.
    """
    simulated, exported = simulated_codes(model, images), onnx_codes(path, images)
    assert len(simulated) == len(exported)
    settled: set[int] = set()
    for ours, codes in zip(simulated, exported, strict=True):
        assert tuple(ours.codes.shape) == codes.shape, ours.name
        quantizer = model.graph_module.get_submodule(ours.name)
        assert isinstance(quantizer, UniformQuantizer)
        ours_codes = ours.codes.numpy().astype(np.int64)
        # Storage shifts codes by a constant: half the range of the storage type or of the codes.
        shift = _storage_shift(codes, quantizer)
        difference = codes - shift - ours_codes
        per_image = len(difference) // len(images)
        for image in range(len(images)):
            rows = slice(image * per_image, (image + 1) * per_image)
            wrong = difference[rows] != 0
            if image in settled or not wrong.any():
                continue
            settled.add(image)
            assert np.abs(difference[rows]).max() == 1, f"{ours.name}: a code is off by more"
            steps = ours.steps[rows].numpy()[wrong]
            from_tie = np.abs(np.abs(steps - np.floor(steps)) - 0.5)
            assert from_tie.max() < NEAR_TIE, f"{ours.name}: {from_tie.max():.1e} from a tie"
            assert wrong.sum() <= max(2, 1e-3 * wrong.size), f"{ours.name}: too many ties"
    return len(settled)


def _storage_shift(codes: NDArray[np.int64], quantizer: UniformQuantizer) -> int:
    signed_storage = codes.min() < 0
    return -(1 << (quantizer.bits - 1)) if signed_storage else 0
