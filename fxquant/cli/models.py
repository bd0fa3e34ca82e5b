"""Models by name, from timm, torchvision and the demo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torchvision
from torch import nn

from fxquant.cli.checkpoint import load_checkpoint
from fxquant.cli.preprocess import (
    Preprocessing,
    plain_preprocessing,
    timm_preprocessing,
    torchvision_preprocessing,
)
from fxquant.errors import ModelError
from fxquant.utils.suggest import did_you_mean

Library = Literal["timm", "torchvision", "demo"]
# Trained models of fxquant.demo.models; named here so that a spelling mistake needs no import.
DEMO_MODELS = ("glyph_vit", "glyph_swin")
# Exceptions of constructors whose arguments are unknown or do not fit.
_CONSTRUCTION_ERRORS = (TypeError, ValueError, LookupError, RuntimeError, AssertionError)
# The demo's pixels are (value - 127.5) / 63.75.
_DEMO_SIZE, _DEMO_MEAN, _DEMO_STD = 64, (0.5,) * 3, (0.25,) * 3


@dataclass(frozen=True, kw_only=True)
class Source:
    """Source of a model.

    Attributes:
        library: library that defines the model.
        name: name of the model in that library.
    """

    library: Library
    name: str


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Choice of a model's weights. A missing choice is an error: no weights are random by accident.

    Attributes:
        checkpoint: file of weights.
        pretrained: use the library's default weights, downloaded.
        random: use random weights.
    """

    checkpoint: Path | None = None
    pretrained: bool = False
    random: bool = False


def find_model(text: str) -> Source:
    """Finds the model that a name on the command line means.

    Args:
        text: ``timm/NAME``, ``torchvision/NAME``, a bare name (timm before torchvision), or a
            demo model.

    Raises:
        ModelError: there is no such model; the message has the nearest name.
    """
    library, _, name = text.rpartition("/")
    if not library and name in DEMO_MODELS:
        return Source(library="demo", name=name)
    if library in ("", "timm") and timm.is_model(name):
        return Source(library="timm", name=name)
    if library in ("", "torchvision") and name in _torchvision_names():
        return Source(library="torchvision", name=name)
    known = {
        "timm": timm.list_models(),
        "torchvision": _torchvision_names(),
        "": [*timm.list_models(), *_torchvision_names(), *DEMO_MODELS],
    }
    if library not in known:
        raise ModelError(
            f"no library {library!r} (in {text!r}){did_you_mean(library, ['timm', 'torchvision'])}"
            "; write timm/NAME or torchvision/NAME",
            got=library,
            expected=("timm", "torchvision"),
        )
    raise ModelError(
        f"no model {name!r} in {library or 'timm or torchvision'}"
        f"{did_you_mean(name, known[library])}"
        "; timm.list_models() and torchvision.models.list_models() name them all",
        got=name,
    )


def _torchvision_names() -> list[str]:
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def preprocessing_of(source: Source, size: int | None = None) -> Preprocessing:
    """The preprocessing of a model's default weights.

    Args:
        source: source of the model.
        size: height and width in pixels; None keeps those of the weights.
    """
    if source.library == "demo":
        return plain_preprocessing(source.name, _DEMO_SIZE, _DEMO_MEAN, _DEMO_STD)
    read = timm_preprocessing if source.library == "timm" else torchvision_preprocessing
    return read(source.name).changed(size=size)


def build_model(source: Source, weights: Weights, arguments: Mapping[str, Any]) -> nn.Module:
    """Builds a model in evaluation mode.

    Args:
        source: source of the model.
        weights: choice of its weights; demo models have their own.
        arguments: arguments of its constructor.

    Raises:
        ModelError: the arguments or the checkpoint do not fit, no weights were chosen, or the
            download failed.
        FileFormatError: the checkpoint is missing or damaged.
    """
    if source.library == "demo":
        return _demo_model(source.name, weights, arguments)
    if weights == Weights():
        raise ModelError(
            f"{source.name} has no weights yet: give --checkpoint FILE, or --pretrained to "
            "download them, or --random-weights if only speed and coverage matter"
        )
    if weights.checkpoint is not None and not weights.checkpoint.is_file():
        raise ModelError(f"--checkpoint {weights.checkpoint} is not a file", got=weights.checkpoint)
    model = _construct(source, weights.pretrained, arguments)
    if weights.checkpoint is not None:
        load_checkpoint(model, weights.checkpoint)
    return model.eval()


def _construct(source: Source, pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        if source.library == "timm":
            model: nn.Module = timm.create_model(source.name, pretrained=pretrained, **arguments)
        else:
            name = "DEFAULT" if pretrained else None
            model = torchvision.models.get_model(source.name, weights=name, **arguments)
    except OSError as error:
        raise ModelError(
            f"cannot download the weights of {source.name} ({str(error)[:150]}). Check the "
            "network, or fetch the file elsewhere and give --checkpoint FILE"
        ) from error
    except _CONSTRUCTION_ERRORS as error:
        listed = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "no arguments"
        raise ModelError(
            f"{source.library} cannot make {source.name} with {listed}: {error}. Check --model-arg",
            got=dict(arguments),
        ) from error
    return model


def _demo_model(name: str, weights: Weights, arguments: Mapping[str, Any]) -> nn.Module:
    if weights != Weights() or arguments:
        raise ModelError(
            f"{name} is already trained and has no arguments; remove --checkpoint, --pretrained, "
            "--random-weights and --model-arg",
            got=name,
        )
    from fxquant.demo.models import build

    model: nn.Module = build(name)
    return model.eval()


def image_size_of(arguments: Mapping[str, Any]) -> int | None:
    """The image size in constructor arguments (``img_size`` or ``image_size``); None if not set."""
    size = arguments.get("img_size", arguments.get("image_size"))
    if isinstance(size, tuple | list) and len(set(size)) == 1:
        size = size[0]
    return size if isinstance(size, int) else None
