"""Export of a FROZEN graph to an ONNX QDQ file, with checks of the file."""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import fx
from torch.utils._pytree import MappingKey, tree_flatten_with_path

from fxquant.backends.onnx_qdq.compact import compact
from fxquant.backends.onnx_qdq.difference import Difference, Outputs, compare
from fxquant.backends.onnx_qdq.doctor import optimization_difference
from fxquant.backends.onnx_qdq.legalize import Legalizer
from fxquant.backends.onnx_qdq.lowerings import rewrite_quantizers
from fxquant.backends.onnx_qdq.packing import pack_weights
from fxquant.backends.onnx_qdq.rules import check_rules
from fxquant.backends.onnx_qdq.runtime import Unfused, inspect, make_session
from fxquant.backends.onnx_qdq.target import Target, resolve_target, u8s8_saturates
from fxquant.backends.onnx_qdq.torch_ops import TRANSLATIONS
from fxquant.backends.onnx_qdq.twin import TwinForm
from fxquant.config.vocabulary import Stage
from fxquant.errors import LoweringError
from fxquant.graph.nodes import stage
from fxquant.utils.files import as_path, write_whole
from fxquant.utils.quiet import quiet

OPSET, IR_VERSION = 21, 10
INPUT_NAME = "images"


@dataclass(frozen=True, kw_only=True)
class OnnxExport:
    """Report on a written file.

    Attributes:
        path: the file.
        file_bytes: size of the file.
        target: name of the CPU family that the file is for.
        fused: integer kernel -> number of nodes that onnxruntime runs on the kernel.
        unfused: products that run in float, with reasons.
        packed: bits -> number of weight codes that are stored at that width; codes of 8 bits and
            more have an integer type of their width.
        twins: forms of the twin quantizers, which QDQ cannot express directly.
        difference: difference of the outputs between optimizations on and off on a random batch;
            None where this CPU's product overflows on the target's types.
        simulation: difference of the file's outputs, without optimizations, from the outputs of
            the simulation.
    """

    path: Path
    file_bytes: int
    target: str
    fused: dict[str, int]
    unfused: tuple[Unfused, ...]
    packed: dict[int, int]
    twins: tuple[TwinForm, ...]
    difference: Difference | None
    simulation: Difference

    def __str__(self) -> str:
        """The report as a few lines of text."""
        kernels = ", ".join(f"{count} {name}" for name, count in sorted(self.fused.items()))
        lines = [
            f"{self.path}: {self.file_bytes / 1e6:.2f} MB for {self.target}",
            f"integer kernels: {kernels or 'none'}",
        ]
        if self.packed:
            counts = (f"{count:,} of {bits} bits" for bits, count in sorted(self.packed.items()))
            lines.append(f"weights packed: {', '.join(counts)}")
        lines += [f"float: {item.node} ({item.op}): {item.reason}" for item in self.unfused]
        if self.twins:
            lines.append(f"twin codes: {_count_forms(self.twins)}")
        if self.difference is None:
            lines.append("numbers not checked: this CPU's uint8 x int8 product overflows")
        else:
            lines.append(f"optimizations on and off differ by {self.difference}")
        if self.simulation.ties:
            lines.append(
                f"file and simulation differ by {self.simulation}: check its accuracy "
                "with `fxquant eval`"
            )
        return "\n".join(lines)


def _count_forms(twins: tuple[TwinForm, ...]) -> str:
    cost = "twice the multiplications; a smaller TensorSpec.max_shift makes it one"
    names = {1: "in one product", 2: f"in two ({cost})", 0: "in float"}
    counts = Counter(twin.products for twin in twins)
    return ", ".join(f"{counts[key]} {name}" for key, name in names.items() if counts[key])


def export_onnx(
    gm: fx.GraphModule, image_shape: tuple[int, ...], path: str | Path, target: str = "auto"
) -> OnnxExport:
    """Writes the file and checks the results that onnxruntime computes with it.

    Args:
        gm: the graph in stage FROZEN; not changed.
        image_shape: shape of one image, ``(C, H, W)``.
        path: the file, which is written under a temporary name next to it and then renamed.
        target: CPU family (``target.TARGETS``), or ``auto`` for the family of this machine.

    Raises:
        LoweringError: the graph has no ONNX form, or onnxruntime computes other results.
        OutputError: the file cannot be written.
        PathTypeError: ``path`` is neither text nor a path.
    """
    path = as_path(path, "path")
    if stage(gm) is not Stage.FROZEN:
        raise LoweringError(
            f"export needs a graph in stage FROZEN, got {stage(gm).name}",
            got=stage(gm),
            expected=Stage.FROZEN,
        )
    chosen = resolve_target(target)
    model, widths, twins = _translate(gm, image_shape, chosen)
    packed = pack_weights(model, widths)
    check_rules(model)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "model.onnx"
        ir.save(model, draft)
        onnx.checker.check_model(str(draft))
        fused, unfused = inspect(draft)
        simulation = _compare(gm, draft, image_shape)
        checked = not (chosen.signed_weights and u8s8_saturates())
        difference = optimization_difference(draft) if checked else None
        if difference is not None and not difference.ok:
            raise LoweringError(
                f"onnxruntime's optimized graph differs by {difference} (relative L2) from the "
                f"plain one for target {chosen.name}; nothing was written. Please report "
                "this with the model",
                got=difference,
            )
        content = draft.read_bytes()
    write_whole(path, lambda temporary: temporary.write_bytes(content))
    return OnnxExport(
        path=path,
        file_bytes=len(content),
        target=chosen.name,
        fused=fused,
        unfused=unfused,
        packed=packed,
        twins=twins,
        difference=difference,
        simulation=simulation,
    )


@torch.no_grad()
def _compare(gm: fx.GraphModule, path: Path, image_shape: tuple[int, ...]) -> Difference:
    """Largest difference between outputs of the file, without optimizations, and the simulation.

    Raises:
        LoweringError: an output differs by more than rounding ties explain.
    """
    images = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0)).numpy()
    device = next((value.device for value in gm.buffers()), torch.device("cpu"))

    def simulate(values: NDArray[np.generic]) -> Outputs:
        # The exporter omits outputs that are None.
        leaves = torch.utils._pytree.tree_leaves(gm(torch.from_numpy(values).to(device)))
        return [leaf.cpu().numpy() for leaf in leaves if leaf is not None]

    expected = simulate(images)
    results = make_session(path, optimize=False).run(None, {INPUT_NAME: images})
    differences = [
        compare([computed], [simulated], images, lambda x, i=i: [simulate(x)[i]])  # type: ignore[misc]
        for i, (simulated, computed) in enumerate(zip(expected, results, strict=True))
    ]
    for difference in differences:
        if not difference.ok:
            raise LoweringError(
                f"the ONNX file differs from the simulation by {difference} (relative L2); "
                "nothing was written. This is a bug; please report it with the model",
                got=difference,
            )
    return max(differences, key=lambda item: item.relative_l2, default=Difference(relative_l2=0.0))


def _translate(
    gm: fx.GraphModule, image_shape: tuple[int, ...], target: Target
) -> tuple[ir.Model, dict[str, int], tuple[TwinForm, ...]]:
    """The model, the widths of its weights' codes by name, and the forms of twin quantizers."""
    legalized = copy.deepcopy(gm).to("cpu")
    twins = rewrite_quantizers(legalized)
    widths = Legalizer(legalized, target).run()
    images = torch.zeros(2, *image_shape)
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                legalized,
                (images,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                custom_translation_table=TRANSLATIONS,
                input_names=[INPUT_NAME],
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:  # the exporter's errors share no base class
        text = str(error).strip().splitlines()
        raise LoweringError(
            f"PyTorch's ONNX exporter failed ({type(error).__name__}: {text[0] if text else ''}). "
            "An operator of the model has no ONNX form; the exporter's error names the operator"
        ) from error
    assert program is not None
    model = program.model
    model.ir_version = IR_VERSION
    compact(model)
    _name_outputs(model, gm)
    return model, widths, twins


def _name_outputs(model: ir.Model, gm: fx.GraphModule) -> None:
    """Names outputs by their keys in a dict, else ``output``, numbered where there are several."""
    (returned,) = gm.graph.output_node().args
    leaves, _ = tree_flatten_with_path(returned)
    used_names = {
        value.name for node in model.graph for value in (*node.inputs, *node.outputs) if value
    }
    paths = [path for path, leaf in leaves if leaf is not None]
    for value, path in zip(model.graph.outputs, paths, strict=True):
        # A step has one field: a key of a dict, an index of a list, or the name of an attribute.
        steps = [astuple(step) for step in path]  # type: ignore[call-overload]
        keys = [str(key) for step in steps for key in step]
        unkeyed = not (path and isinstance(path[0], MappingKey))
        name = "_".join(["output", *keys] if unkeyed else keys)
        while name in used_names:
            name += "_"
        used_names.add(name)
        if not value.is_graph_input():
            value.name = name
