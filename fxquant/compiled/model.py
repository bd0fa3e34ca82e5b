"""The result of a compilation: a module that runs, reports, saves, and lowers to backends."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fxquant.compiled.input_checks import InputCheck, batch_error, check_images, check_shape
from fxquant.compiled.report import PlanEntry, Report
from fxquant.compiled.storage import Stored, read, write
from fxquant.errors import LoweringError
from fxquant.utils.files import as_path

if TYPE_CHECKING:
    from fxquant.backends.onnx_qdq import OnnxExport


class CompiledModel(nn.Module):
    """A quantized model.

    A call simulates quantization in float arithmetic; inputs and outputs are those of the captured
    model.

    Args:
        gm: graph in stage FROZEN.
        report: the record of the compilation.
        policy: the recipe, as plain values.
        image_shape: shape of one input image, ``(C, H, W)``.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        report: Report,
        policy: dict[str, Any],
        image_shape: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.graph_module = gm
        self.report = report
        self.policy = policy
        self.image_shape = image_shape
        self.eval()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> CompiledModel:
        """Moves the model to another device; scales and grids are valid only in float32.

        Raises:
            LoweringError: the parameters would get another type.
        """
        dtype = fn(torch.zeros(())).dtype
        if dtype is not torch.float32:
            raise LoweringError(
                f"the model was quantized in float32, got a cast to {dtype}, which would change "
                "its codes; export_onnx() and lower() make small and fast models",
                got=dtype,
                expected=torch.float32,
            )
        model: CompiledModel = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return model

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModel:
        gm = copy.deepcopy(self.graph_module, memo)
        return CompiledModel(gm, self.report, self.policy, self.image_shape)

    def __reduce__(self) -> tuple[Callable[..., CompiledModel], tuple[Any, ...]]:
        """Pickles the files of :meth:`save`, on the CPU: torch does not pickle specs of graphs."""
        with tempfile.TemporaryDirectory() as name:
            self.save(name)
            files = {path.name: path.read_bytes() for path in Path(name).iterdir()}
        return _unpickled, (files,)

    @property
    def plan(self) -> tuple[PlanEntry, ...]:
        """The decision for each edge."""
        return self.report.plan

    def forward(self, images: Tensor) -> Any:
        """Outputs of the quantized model, for images ``(B, C, H, W)``.

        Raises:
            BatchError: the images are not a float tensor, or differ in size from the images that
                the model was compiled for; or the model fails on them, and they are none, or not
                in float32.
        """
        check_shape(check_images(images), self.image_shape)
        try:
            return self.graph_module(images)
        except (RuntimeError, TypeError, IndexError) as error:
            explanation = batch_error(images, self.image_shape)
            if explanation is None:
                raise
            raise explanation from error

    def lower(self, backend: str, **flags: Any) -> nn.Module:
        """Lowers the model to a backend that runs in this process.

        Args:
            backend: ``integer`` (reference kernels on integer codes;
                :func:`fxquant.backends.integer.lower_to_integer`) or ``inductor``
                (``torch.compile`` of the integer form).
            **flags: flags of the backend. ``integer`` takes ``integer_only`` (compute nothing in
                float between the first and the last code; by default where the policy quantizes
                everything in between and all of the graph has an integer form) and
                ``float_products`` (multiply whole numbers held as floats, with the same results,
                faster).

        Returns:
            A module with the same inputs, for images of exactly the shape that the model was
            compiled for; it raises BatchError for other shapes, and NonFiniteError for NaN and
            infinity.

        Raises:
            LoweringError: the backend or a flag is unknown, a flag has a value of the wrong type,
                or the backend cannot express the graph as asked.
        """
        from fxquant.backends.base import load_backend

        lowered = load_backend(backend, flags)(self.graph_module, **flags)
        lowered.register_forward_pre_hook(InputCheck(self.image_shape), with_kwargs=True)
        return lowered

    def export_onnx(self, path: str | Path, *, target: str = "auto") -> OnnxExport:
        """Writes an ONNX QDQ file for onnxruntime (opset 21, IR 10, dynamic batch).

        Args:
            path: the file; written under a temporary name and renamed.
            target: CPUs that the file is for: ``x86-vnni``, ``x86-avx2``, or ``auto`` for the
                CPU of this machine.

        Returns:
            File size, and the nodes that onnxruntime runs on integer kernels.

        Raises:
            LoweringError: ONNX cannot express the graph, or onnxruntime's result is wrong.
            OutputError: the file cannot be written.
            PathTypeError: ``path`` is neither text nor a path.
        """
        from fxquant.backends.onnx_qdq import export_onnx

        return export_onnx(self.graph_module, self.image_shape, path, target)

    def save(self, folder: str | Path) -> None:
        """Writes ``quant_config.json`` and ``model.safetensors``; :func:`load` reads them.

        Raises:
            OutputError: the folder cannot be written.
            PathTypeError: ``folder`` is neither text nor a path.
        """
        stored = Stored(self.graph_module, self.report, self.policy, self.image_shape)
        write(as_path(folder, "folder"), stored)


def load(folder: str | Path) -> CompiledModel:
    """Reads a folder that :meth:`CompiledModel.save` wrote.

    Raises:
        FileFormatError: a file is missing, truncated, or not fxquant's; the two files are not of
            one save, or were changed since; or they hold an impossible number.
        PathTypeError: ``folder`` is neither text nor a path.
    """
    stored = read(as_path(folder, "folder"))
    return CompiledModel(stored.gm, stored.report, stored.policy, stored.image_shape)


def _unpickled(files: dict[str, bytes]) -> CompiledModel:
    with tempfile.TemporaryDirectory() as name:
        for file, data in files.items():
            (Path(name) / file).write_bytes(data)
        return load(name)
