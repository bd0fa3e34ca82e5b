"""A compiled model on disk: ``quant_config.json`` and ``model.safetensors``.

Quantized weights are stored as integer codes. The graph is rebuilt from ``graph``, ``quantizers``,
``coded_weights`` and ``specs`` (edge name -> spec) of the configuration; its ``report`` is only
read by people.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from fxquant import quantizers
from fxquant.compiled import integrity
from fxquant.compiled.older_formats import READABLE, to_current_format
from fxquant.compiled.output_errors import OutputKind
from fxquant.compiled.report import Report, spec_from_dict
from fxquant.config.vocabulary import Stage
from fxquant.errors import FileFormatError, FxQuantError
from fxquant.graph.edges import edges, possible_edges
from fxquant.graph.meta import STAGE
from fxquant.graph.nodes import get_parameter, submodule
from fxquant.graph.rewrite import propagate_shapes
from fxquant.graph.serialize import graph_from_json, graph_to_json, set_tensor
from fxquant.graph.verify import verify
from fxquant.policies.policy_file import policy_from_dict
from fxquant.quantizers import Quantizer
from fxquant.utils.files import write_together, write_utf8

CONFIG_FILE, WEIGHTS_FILE = "quant_config.json", "model.safetensors"
FORMAT = READABLE[-1]
_CODES_PREFIX = "codes."


@dataclass(frozen=True)
class Stored:
    """The stored data of a compiled model.

    Attributes:
        gm: graph in stage FROZEN.
        report: the record of the compilation.
        policy: the recipe, as plain values.
        image_shape: shape of one input image, ``(C, H, W)``.
    """

    gm: fx.GraphModule
    report: Report
    policy: dict[str, Any]
    image_shape: tuple[int, ...]


def write(folder: Path, stored: Stored) -> None:
    """Writes both files; a failure leaves neither.

    Raises:
        OutputError: the folder cannot be written.
    """
    tensors, coded = _pack(stored.gm)
    config = {
        "format": FORMAT,
        "torch": torch.__version__.split("+")[0],
        "policy": stored.policy,
        "image_shape": list(stored.image_shape),
        "quantizers": {
            name: module.config()
            for name, module in stored.gm.named_modules()
            if isinstance(module, Quantizer)
        },
        "coded_weights": coded,
        "specs": {
            edge.name: asdict(edge.spec) for edge in edges(stored.gm) if edge.spec is not None
        },
        "graph": graph_to_json(stored.gm.graph),
        "report": stored.report.to_dict(),
    }

    def write_tensors(temporary: Path) -> None:
        save_file(tensors, temporary, integrity.metadata(config))
        config[integrity.TENSORS_KEY] = integrity.digest(temporary)

    write_together(  # in this order: the configuration holds the digest of the tensors' file
        {
            folder / WEIGHTS_FILE: write_tensors,
            folder / CONFIG_FILE: lambda path: write_utf8(path, json.dumps(config, indent=1)),
        }
    )


def read(folder: Path) -> Stored:
    """Reads the files that :func:`write` wrote.

    Raises:
        FileFormatError: a file is missing, truncated, or not fxquant's; the two files are not of
            one save, or were changed since; or they hold an impossible number.
    """
    config, tensors = _read_config(folder / CONFIG_FILE), _read_tensors(folder / WEIGHTS_FILE)
    try:
        integrity.check_tensors(folder / WEIGHTS_FILE, config)
        current = to_current_format(config)
        policy_from_dict(current["policy"])
        gm = _rebuild(current, tensors)
        report = Report.from_dict(current["report"])
        shape = tuple(int(n) for n in config["image_shape"])
        # The last check, since the checks before it have more precise messages.
        integrity.check_config(folder / WEIGHTS_FILE, config)
        return Stored(gm, report, current["policy"], shape)
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
            f"({type(error).__name__}: {error}); compile and save the model again",
            got=folder,
        ) from error


def output_kinds(folder: Path) -> tuple[OutputKind, ...]:
    """The kind of each output of a saved model, empty where its report has none.

    Models that were saved by an older version have none, and neither has a folder without a
    readable configuration, since this is a look at the report that people read.
    """
    try:
        report = json.loads((folder / CONFIG_FILE).read_bytes())["report"]
        return tuple(OutputKind(error["kind"]) for error in report["outputs"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ()


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
            tensors[_CODES_PREFIX + name] = codes.to(dtype).contiguous()
            coded[name] = next(iter(users))
        else:
            tensors[name] = value.contiguous().clone()
    for name, module in gm.named_modules():
        if isinstance(module, Quantizer):
            for key, buffer in module.named_buffers():
                tensors[f"{name}.{key}"] = buffer.detach().cpu().contiguous().clone()
    return tensors, coded


def _code_shift(quantizer: Quantizer) -> int:
    """Difference between a code and its stored form, which is signed."""
    return quantizer.code_range[0] + (1 << (quantizer.bits - 1))


def _rebuild(config: dict[str, Any], tensors: dict[str, Tensor]) -> fx.GraphModule:
    root = nn.Module()
    integrity.check_numbers(tensors)
    for name, settings in config["quantizers"].items():
        quantizer = quantizers.from_config(settings)
        state = {key: tensors.pop(f"{name}.{key}") for key, _ in quantizer.named_buffers()}
        quantizer.load_state_dict(state)
        integrity.check_quantizer(name, quantizer)
        parent, _, last = name.rpartition(".")
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root.get_submodule(parent).add_module(last, quantizer)
    for name, codes in tensors.items():
        weight_name, value = name.removeprefix(_CODES_PREFIX), codes
        if weight_name != name:
            module = root.get_submodule(config["coded_weights"][weight_name])
            if not isinstance(module, Quantizer):
                raise FileFormatError(
                    f"{weight_name} is stored as codes of {module}, which is not a quantizer",
                    edge=weight_name,
                )
            integrity.check_codes(weight_name, codes, module.bits)
            value = module.dequantize(codes.float() + _code_shift(module))
        set_tensor(root, weight_name, value)
    graph = graph_from_json(config["graph"])
    integrity.check_all_read((name.removeprefix(_CODES_PREFIX) for name in tensors), graph)
    gm = fx.GraphModule(root, graph)
    STAGE.set(gm, Stage.FROZEN)
    propagate_shapes(gm, tuple(config["image_shape"]))
    specs = {name: spec_from_dict(values) for name, values in config["specs"].items()}
    for edge in list(possible_edges(gm)):
        if edge.name in specs:
            edge.annotate(specs[edge.name])
    integrity.check_specs(gm, specs)
    gm.graph.lint()
    verify(gm)
    return gm


def _read_config(path: Path) -> dict[str, Any]:
    advice = "give the folder that CompiledModel.save or `fxquant compile` wrote"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileFormatError(
            f"cannot read {path}: {error.strerror}; {advice}", got=path
        ) from error
    except (ValueError, RecursionError) as error:
        raise FileFormatError(
            f"{path} is not JSON ({error}): truncated or not fxquant's; {advice}", got=path
        ) from error
    if not isinstance(config, dict) or config.get("format") not in READABLE:
        file_format = config.get("format") if isinstance(config, dict) else None
        raise FileFormatError(
            f"{path} is not of format {FORMAT} or {READABLE[0]} (found {file_format!r}); {advice}, "
            "with this version or the version before",
            got=file_format,
            expected=READABLE,
        )
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise FileFormatError(
            f"cannot read {path}: {error}; it is missing, truncated or not a safetensors file",
            got=path,
        ) from error
