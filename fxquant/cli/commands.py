"""The commands ``compile``, ``eval`` and ``doctor``."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from fxquant.cli.comparison import compare, kinds_of
from fxquant.cli.data import DEMO, Batches, FlatFolder, batches, check_labelled, open_data
from fxquant.cli.evaluation import (
    Runtime,
    Score,
    check_images,
    evaluate,
    onnx_runtime,
    torch_runtime,
)
from fxquant.cli.models import (
    DEMO_MODELS,
    Weights,
    build_model,
    find_model,
    image_size_of,
    preprocessing_of,
)
from fxquant.cli.policies import policy_of
from fxquant.cli.preprocess import (
    PREPROCESSING_FILE,
    Preprocessing,
    plain_preprocessing,
    read_preprocessing,
)
from fxquant.cli.widths import with_budget
from fxquant.compiled.model import CompiledModel, load
from fxquant.compiled.output_errors import OutputKind
from fxquant.compiled.report import Report
from fxquant.compiled.storage import CONFIG_FILE, WEIGHTS_FILE, output_kinds
from fxquant.compiler import compile
from fxquant.errors import DataError, FileFormatError, ModelError
from fxquant.utils.files import check_writable, write_text, write_together
from fxquant.utils.log import LOGGER, logged
from fxquant.utils.notes import NoteKind
from fxquant.utils.progress import track, working

if TYPE_CHECKING:
    from fxquant.backends.onnx_qdq import OnnxExport

ONNX_FILE = "model.onnx"
# Folder of the losses and blocks from which an interrupted search or training continues.
_CACHE = "cache"
# Number of edges named for one reason; quant_config.json has all.
_NAMED_EDGES = 6
# Number of calibration images: default, default when training holds some out, minimum for training.
_IMAGES, _TRAINING_IMAGES, _LEAST_TRAINING_IMAGES = 32, 1024, 128
_FILES = (ONNX_FILE, CONFIG_FILE, WEIGHTS_FILE, PREPROCESSING_FILE)


def run_compile(options: Namespace) -> int:
    """``fxquant compile``: quantizes a model and writes it."""
    from fxquant.backends.onnx_qdq.target import resolve_target

    # Arguments are checked before anything takes long.
    source, policy = find_model(options.model), with_budget(policy_of(options), options)
    resolve_target(options.target)
    check_writable(options.out)
    arguments = dict(options.model_arg)
    size = image_size_of(arguments)
    preprocessing = _override(preprocessing_of(source, size), options)
    trains = policy.reconstruction is not None and policy.reconstruction.held_out > 0
    count = options.images or (_TRAINING_IMAGES if trains else _IMAGES)
    loader = _calibration_loader(options, preprocessing, count)
    weights = Weights(
        checkpoint=options.checkpoint, pretrained=options.pretrained, random=options.random_weights
    )
    torch.manual_seed(options.seed)
    model = build_model(source, weights, arguments)
    images = _read_images(loader, count)
    cache = options.out / _CACHE
    image_count = sum(map(len, images))
    LOGGER.info("policy %s, %d images, cache %s", policy.name, image_count, cache)
    with logged(f"compilation of {source.name}"):
        compiled = compile(model, images, policy, cache=cache, progress=True)
    export = write_artifacts(compiled, preprocessing, options.out, options.target)
    print(compiled.report.summary())
    print_outputs(compiled.report)
    if (
        trains
        and compiled.report.changes.get("Reconstruct")
        and image_count < _LEAST_TRAINING_IMAGES
    ):
        print(f"note: trained on {image_count} images; hundreds (--images) train better")
    if compiled.report.allocation is not None:
        print(compiled.report.allocation.summary())
    print_left_float(compiled.report)
    print(export)
    print(f"wrote {', '.join(_FILES)} in {options.out}")
    if cache.exists():
        print(f"the same search or training can continue from {cache}; delete it at will")
    return 0


def _calibration_loader(options: Namespace, preprocessing: Preprocessing, count: int) -> Batches:
    if options.data is None and options.model not in DEMO_MODELS:
        raise DataError(
            "--data is missing: give a folder of images like those that the model will see"
        )
    name = options.data or DEMO
    data = open_data(name, preprocessing, labelled=False, split="calib", count=count)
    return batches(data, count, options.batch_size, options.seed)


def _read_images(loader: Batches, count: int) -> list[torch.Tensor]:
    """Reads all batches, so that a damaged file is reported before the model is captured."""
    images = [batch for batch, _ in track(loader, label="read images", total=len(loader))]
    available = sum(map(len, images))
    if available < count:
        print(f"note: --data has {available} images, {count} were asked for", file=sys.stderr)
    return images


def write_artifacts(
    compiled: CompiledModel, preprocessing: Preprocessing, folder: Path, target: str = "auto"
) -> OnnxExport:
    """Writes the model's four files: all of them, or none.

    Args:
        compiled: the compiled model.
        preprocessing: preprocessing of its images.
        folder: folder of the files; it is made.
        target: CPUs that the ONNX file is for.

    Raises:
        LoweringError: the model has no ONNX form.
        OutputError: the folder cannot be written.
    """
    with tempfile.TemporaryDirectory() as name, working("export ONNX"), logged("export"):
        draft = Path(name)
        export = compiled.export_onnx(draft / ONNX_FILE, target=target)
        compiled.save(draft)
        write_text(draft / PREPROCESSING_FILE, preprocessing.to_json())
        write_together({folder / file: partial(_copy, draft / file) for file in _FILES})
        LOGGER.info("wrote %s in %s", ", ".join(_FILES), folder)
    return dataclasses.replace(export, path=folder / ONNX_FILE)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def print_outputs(report: Report) -> None:
    """Prints the outputs that are not logits: why they are not, and their errors."""
    if any(error.kind is not OutputKind.LOGITS for error in report.outputs):
        for error in report.outputs:
            print(error)
    for note in report.notes:
        if note.kind is NoteKind.OUTPUT:
            print(f"{note.site}: {note.reason}")


def print_left_float(report: Report) -> None:
    """Prints the edges that stayed float, by reason."""
    by_reason: dict[str, list[str]] = {}
    for entry in report.left_float:
        by_reason.setdefault(entry.reason or "the policy keeps it float", []).append(entry.edge)
    for reason, names in by_reason.items():
        more = f" and {len(names) - _NAMED_EDGES} more" if len(names) > _NAMED_EDGES else ""
        print(f"stayed float: {', '.join(names[:_NAMED_EDGES])}{more}: {reason}")


def run_eval(options: Namespace) -> int:
    """``fxquant eval``: measures speed, and accuracy or the error of outputs without classes."""
    runtime, folder = _open_runtime(options.path, options.backend, options.threads)
    preprocessing = _find_preprocessing(folder, options, runtime.image_shape)
    data = open_data(options.data, preprocessing, labelled=False, count=options.images)
    loader = batches(data, options.images, options.batch_size, options.seed)
    first = next(iter(loader))[0]
    check_images(runtime, first)
    recorded = output_kinds(options.path) if options.path.is_dir() else ()
    kinds = kinds_of(runtime.run(first), options.outputs, recorded)
    scored = options.outputs == "logits" or kinds == (OutputKind.LOGITS,)
    if not scored and options.reference is None:
        raise ModelError(
            f"{runtime.name} gives {_described(kinds)}, which have no accuracy: give --reference "
            "MODEL (a name with --checkpoint or --pretrained, or an .onnx file) to compare them "
            "with the float model's, or --outputs logits where the first output is scores",
            got=kinds,
        )
    figures: dict[str, Any] = {}
    if scored and (options.reference is None or not isinstance(data, FlatFolder)):
        check_labelled(options.data, data)
        score = evaluate(runtime, loader, len(loader))
        figures |= score.to_dict()
        _note_classes(data, score)
        if not options.json:
            print(score)
    if options.reference is not None:
        reference = _open_reference(options)
        comparison = compare(runtime, reference, loader, kinds, len(loader))
        figures |= comparison.to_dict()
        if not options.json:
            print(comparison)
    if options.json:
        print(json.dumps(figures, indent=1))
    return 0


def _described(kinds: tuple[OutputKind, ...]) -> str:
    names = {
        OutputKind.LOGITS: "logits",
        OutputKind.EMBEDDING: "embeddings",
        OutputKind.DENSE: "maps or tokens",
    }
    return " and ".join(dict.fromkeys(names[kind] for kind in kinds)) or "no float tensors"


def _open_reference(options: Namespace) -> Runtime:
    """The float model of ``--reference``: a file or folder, or a model by name.

    Raises:
        ModelError: there is no such model, or its weights are missing.
        FileFormatError: there is no such file, or the file cannot be read.
    """
    path = Path(options.reference)
    if path.exists() or path.suffix == ".onnx":
        return _open_runtime(path, None, options.threads)[0]
    weights = Weights(
        checkpoint=options.checkpoint, pretrained=options.pretrained, random=options.random_weights
    )
    source = find_model(options.reference)
    torch.manual_seed(options.seed)
    model = build_model(source, weights, dict(options.model_arg))
    return torch_runtime(f"{source.name} in float32", model)


def _note_classes(data: Dataset[Any], score: Score) -> None:
    """Notes on stderr that the data have other classes than the model."""
    classes = len(getattr(data, "classes", range(score.classes)))
    if classes != score.classes:
        print(
            f"note: the data has {classes} class folders, the model {score.classes} outputs; "
            "folders are numbered by name from 0, so compare only if these are the first outputs",
            file=sys.stderr,
        )


def _open_runtime(path: Path, backend: str | None, threads: int | None) -> tuple[Runtime, Path]:
    """The runtime, and the folder where its preprocessing may be."""
    if not path.exists():
        raise FileFormatError(
            f"{path} does not exist; give the folder from compile, or an .onnx", got=path
        )
    if not path.is_dir():
        if backend not in (None, "onnx"):
            raise ModelError(
                f"{path} is an ONNX file, backend {backend} needs the folder that compile wrote",
                got=backend,
                expected="onnx",
            )
        return onnx_runtime(path, threads), path.parent
    if backend is None:
        backend = "onnx" if (path / ONNX_FILE).exists() else "torch"
    if backend == "onnx":
        return onnx_runtime(path / ONNX_FILE, threads), path
    compiled = load(path)
    module = compiled if backend == "torch" else compiled.lower("integer")
    name = "torch simulation" if backend == "torch" else "integer kernels"
    return torch_runtime(name, module, compiled.image_shape), path


def _find_preprocessing(
    folder: Path, options: Namespace, shape: tuple[int, ...] | None
) -> Preprocessing:
    """Preprocessing by ``--model``, else by the file next to the model, else by the options."""
    size = shape[-1] if shape is not None and shape[-1] == shape[-2] else None
    if options.model is not None:
        return _override(preprocessing_of(find_model(options.model), size), options)
    file = folder / PREPROCESSING_FILE
    if file.exists():
        return _override(read_preprocessing(file), options)
    size = options.image_size or size
    if options.data == DEMO:
        return preprocessing_of(find_model(DEMO_MODELS[0]))
    if size is None or options.mean is None or options.std is None:
        raise DataError(
            f"how images are prepared for {options.path} is unknown: there is no {file}. Give "
            "--model NAME, or --image-size, --mean and --std",
            got=options.path,
        )
    return plain_preprocessing(str(options.path), size, options.mean, options.std)


def _override(preprocessing: Preprocessing, options: Namespace) -> Preprocessing:
    return preprocessing.changed(size=options.image_size, mean=options.mean, std=options.std)


def run_doctor(options: Namespace) -> int:
    """``fxquant doctor``: checks a file; exit code 1 if optimizations change its results."""
    from fxquant.backends.onnx_qdq import doctor

    images = None
    if options.data is not None:
        shape = onnx_runtime(options.path, options.threads).image_shape
        preprocessing = _find_preprocessing(options.path.parent, options, shape)
        data = open_data(options.data, preprocessing, labelled=False)
        images = next(iter(batches(data, options.images, options.images, options.seed)))[0].numpy()
    with working("doctor"):
        report = doctor(options.path, images)
    print(report)
    return 0 if report.ok else 1
