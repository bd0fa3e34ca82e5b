"""The result of a compilation: runs, explains itself, saves, and lowers to backends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from fxquant import quantizers, saved_checks
from fxquant.errors import FileFormatError, FxQuantError, LoweringError
from fxquant.files import write_together, write_utf8
from fxquant.graph import get_parameter, possible_edges, submodule
from fxquant.inputs import InputCheck, check_images, explained
from fxquant.policy_file import policy_from_dict
from fxquant.quantizers import Quantizer
from fxquant.report import PlanEntry, Report
from fxquant.rewrite import propagate_shapes
from fxquant.serialize import graph_from_json, graph_to_json, set_tensor
from fxquant.spec import Stage
from fxquant.suggest import did_you_mean
from fxquant.verify import verify

if TYPE_CHECKING:
    from fxquant.backends.onnx_qdq import OnnxExport

CONFIG_FILE, WEIGHTS_FILE = "quant_config.json", "model.safetensors"
FORMAT = 4
BACKENDS = ("integer", "inductor")
_CODES = "codes."


class CompiledModel(nn.Module):
    """A quantized model.

    Calling it simulates quantization in float arithmetic; it takes and gives what the captured
    model did.

    Args:
        gm: graph in stage FROZEN.
        report: what was decided.
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
        """Moves to another device; scales and grids hold in float32 alone.

        Raises:
            LoweringError: the numbers would be of another type.
        """
        wanted = fn(torch.zeros(())).dtype
        if wanted is not torch.float32:
            raise LoweringError(
                f"the model was quantized in float32, got a cast to {wanted}: its codes would "
                "become others; export_onnx() and lower() give what is small and fast"
            )
        moved: CompiledModel = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved

    @property
    def plan(self) -> tuple[PlanEntry, ...]:
        """The decision for each edge."""
        return self.report.plan

    def forward(self, images: Tensor) -> Any:
        """Outputs of the quantized model, for images ``(B, C, H, W)``.

        Raises:
            BatchError: the images are no float numbers; or are not in float32, or of another shape
                than those that the model was compiled for, and it does not run on them.
        """
        check_images(images)
        try:
            return self.graph_module(images)
        except (RuntimeError, TypeError, IndexError) as error:
            explanation = explained(images, self.image_shape, error)
            if explanation is None:
                raise
            raise explanation from error

    def lower(
        self, backend: str, *, integer_only: bool | None = None, float_products: bool = False
    ) -> nn.Module:
        """This model for a backend that runs in this process.

        Args:
            backend: ``integer`` (reference kernels on integer codes) or ``inductor``
                (``torch.compile`` of the integer form).
            integer_only: of ``integer``: compute nothing in float between the first and the last
                code. None does so where the policy quantizes what is between products
                (``policies.w8a8(full=True)``) and all of the graph has an integer form; else
                ``meta["float_because"]`` of the result says why not.
            float_products: of the integer-only form: multiply whole numbers held as floats, with
                the same results, faster; on a GPU torch has no other product.

        Returns:
            A module that takes images as this does, of the shape that it was compiled for alone;
            it raises BatchError for others, and NonFiniteError for NaN and infinity.

        Raises:
            LoweringError: unknown backend, or it cannot express the graph as asked.
        """
        if backend not in BACKENDS:
            raise LoweringError(
                f"no backend {backend!r}{did_you_mean(backend, BACKENDS)}; there are "
                f"{', '.join(BACKENDS)}, and export_onnx() for onnxruntime"
            )
        lowered = self._lowered(backend, integer_only, float_products)
        lowered.register_forward_pre_hook(InputCheck(self.image_shape), with_kwargs=True)
        return lowered

    def _lowered(self, backend: str, integer_only: bool | None, float_products: bool) -> nn.Module:
        from fxquant.backends.integer import lower_to_integer

        if backend == "integer":
            return lower_to_integer(
                self.graph_module, integer_only=integer_only, float_products=float_products
            )
        if integer_only or float_products:
            raise LoweringError("integer_only and float_products belong to backend 'integer' alone")
        from fxquant.backends.inductor import compile_integer

        return compile_integer(lower_to_integer(self.graph_module, integer_only=False))

    def export_onnx(self, path: str | Path, *, target: str = "auto") -> OnnxExport:
        """Writes an ONNX QDQ file for onnxruntime (opset 21, IR 10, dynamic batch).

        Args:
            path: the file; written beside and renamed.
            target: CPUs that the file is for: ``x86-vnni``, ``x86-avx2``, or ``auto`` for the
                one of this machine.

        Returns:
            File size, and which nodes onnxruntime runs on integer kernels.

        Raises:
            LoweringError: ONNX cannot express the graph, or onnxruntime's result is wrong.
            OutputError: the file cannot be written.
        """
        from fxquant.backends.onnx_qdq import export_onnx

        return export_onnx(self.graph_module, self.image_shape, Path(path), target)

    def save(self, folder: str | Path) -> None:
        """Writes ``quant_config.json`` and ``model.safetensors``; :func:`load` reads them.

        Quantized weights are stored as integer codes.

        Raises:
            OutputError: the folder cannot be written.
        """
        folder = Path(folder)
        tensors, coded = _pack(self.graph_module)
        config = {
            "format": FORMAT,
            "torch": torch.__version__.split("+")[0],
            "policy": self.policy,
            "image_shape": list(self.image_shape),
            "quantizers": {
                name: module.config()
                for name, module in self.graph_module.named_modules()
                if isinstance(module, Quantizer)
            },
            "coded_weights": coded,
            "graph": graph_to_json(self.graph_module.graph),
            "report": self.report.to_dict(),
        }

        def write_tensors(temporary: Path) -> None:
            save_file(tensors, temporary, saved_checks.metadata(config))
            config[saved_checks.TENSORS_KEY] = saved_checks.digest(temporary)

        write_together(  # in this order, since the one has the digest of the other
            {
                folder / WEIGHTS_FILE: write_tensors,
                folder / CONFIG_FILE: lambda path: write_utf8(path, json.dumps(config, indent=1)),
            }
        )


def load(folder: str | Path) -> CompiledModel:
    """Reads what :meth:`CompiledModel.save` wrote.

    Raises:
        FileFormatError: a file is missing, truncated, or not fxquant's; the two are not of one
            save, or were changed since; or a number in them cannot be.
    """
    folder = Path(folder)
    config, tensors = _read_config(folder / CONFIG_FILE), _read_tensors(folder / WEIGHTS_FILE)
    try:
        saved_checks.check_tensors(folder / WEIGHTS_FILE, config)
        policy_from_dict(config["policy"])
        gm = _rebuild(config, tensors)
        report = Report.from_dict(config["report"])
        shape = tuple(int(n) for n in config["image_shape"])
        # Last, since what else is wrong can be named more closely.
        saved_checks.check_config(folder / WEIGHTS_FILE, config)
        return CompiledModel(gm, report, config["policy"], shape)
    except FileFormatError:
        raise
    except (
        FxQuantError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        OverflowError,
    ) as error:
        raise FileFormatError(
            f"{folder}: {CONFIG_FILE} and {WEIGHTS_FILE} do not fit together or are damaged "
            f"({type(error).__name__}: {error}); compile and save the model again"
        ) from error


def _pack(gm: fx.GraphModule) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to store, and for each weight stored as codes the name of its quantizer."""
    tensors: dict[str, Tensor] = {}
    coded: dict[str, str] = {}
    for node in gm.graph.nodes:
        if node.op != "get_attr":
            continue
        name, value = str(node.target), get_parameter(gm, node).detach().cpu()
        users = {str(user.target): submodule(gm, user) for user in node.users}
        quantizer = next(iter(users.values())) if len(users) == 1 else None
        if isinstance(quantizer, Quantizer):
            dtype = torch.int8 if quantizer.bits <= 8 else torch.int16
            codes = quantizer.quantize(get_parameter(gm, node)).cpu()
            # Unsigned codes are stored shifted to the signed type of their width.
            codes = codes - _code_shift(quantizer)
            tensors[_CODES + name] = codes.to(dtype).contiguous()
            coded[name] = next(iter(users))
        else:
            tensors[name] = value.contiguous().clone()
    for name, module in gm.named_modules():
        if isinstance(module, Quantizer):
            for key, buffer in module.named_buffers():
                tensors[f"{name}.{key}"] = buffer.detach().cpu().contiguous().clone()
    return tensors, coded


def _code_shift(quantizer: Quantizer) -> int:
    # The code words of a twin quantizer are unsigned.
    signed = bool(quantizer.config().get("signed", False))
    return 0 if signed else 1 << (quantizer.bits - 1)


def _rebuild(config: dict[str, Any], tensors: dict[str, Tensor]) -> fx.GraphModule:
    root = nn.Module()
    saved_checks.check_numbers(tensors)
    for name, settings in config["quantizers"].items():
        quantizer = quantizers.from_config(settings)
        state = {key: tensors.pop(f"{name}.{key}") for key, _ in quantizer.named_buffers()}
        quantizer.load_state_dict(state)
        saved_checks.check_quantizer(name, quantizer)
        parent, _, last = name.rpartition(".")
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root.get_submodule(parent).add_module(last, quantizer)
    for name, codes in tensors.items():
        plain, value = name.removeprefix(_CODES), codes
        if plain != name:
            coder = root.get_submodule(config["coded_weights"][plain])
            if not isinstance(coder, Quantizer):
                raise FileFormatError(f"{plain} is stored as codes of {coder}, no quantizer")
            saved_checks.check_codes(plain, codes, coder.bits)
            value = coder.dequantize(codes.float() + _code_shift(coder))
        set_tensor(root, plain, value)
    graph = graph_from_json(config["graph"])
    saved_checks.check_all_read((name.removeprefix(_CODES) for name in tensors), graph)
    gm = fx.GraphModule(root, graph)
    gm.meta["stage"] = Stage.FROZEN
    report = Report.from_dict(config["report"])
    propagate_shapes(gm, tuple(config["image_shape"]))
    specs = {entry.edge: entry.spec for entry in report.plan if entry.spec is not None}
    for edge in list(possible_edges(gm)):
        if edge.name in specs:
            edge.node.meta["quant"] = {
                **edge.node.meta.get("quant", {}),
                edge.arg: specs[edge.name],
            }
    gm.graph.lint()
    verify(gm)
    return gm


def _read_config(path: Path) -> dict[str, Any]:
    advice = "give the folder that CompiledModel.save or `fxquant compile` wrote"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileFormatError(f"cannot read {path}: {error.strerror}; {advice}") from error
    except (ValueError, RecursionError) as error:
        raise FileFormatError(
            f"{path} is no JSON ({error}): truncated or foreign; {advice}"
        ) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else None
        raise FileFormatError(
            f"{path} is not of format {FORMAT} (found {found!r}); {advice}, with this version"
        )
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise FileFormatError(
            f"cannot read {path}: {error}; it is missing, truncated or no safetensors file"
        ) from error
