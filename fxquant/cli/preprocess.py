"""Preprocessing of images as the model's weights need it, and the file that stores it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fxquant.errors import DataError, FileFormatError

PREPROCESSING_FILE = "preprocessing.json"
FORMAT = 1
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# ImageNet practice: the shorter side is resized to 256, then 224 x 224 are cut from the centre.
_CROP = 224 / 256


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resizing, cropping and normalisation of images.

    ``fxquant compile`` writes these fields and ``format`` next to the model, as
    ``preprocessing.json``.

    Attributes:
        model: name of the model.
        library: library of the transform; the two resize differently.
        settings: keyword arguments of ``timm.data.create_transform`` or of torchvision's
            ``ImageClassification``.
    """

    model: str
    library: Literal["timm", "torchvision"]
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Checks mean and std.

        Raises:
            DataError: mean or std does not fit values in 0..1.
        """
        for name, least in (("mean", -1e-9), ("std", 0.0)):
            values = self.settings.get(name)
            if values is not None and not all(least < value <= 1 for value in values):
                advice = "; divide those of values in 0..255 by 255" if max(values) > 1 else ""
                raise DataError(
                    f"{name} must be of values in 0..1{', above 0' if name == 'std' else ''}, got "
                    f"{', '.join(map(str, values))}{advice}",
                    got=values,
                )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image, ``(3, H, W)``."""
        if self.library == "timm":
            height, width = self.settings["input_size"][-2:]
        else:
            height = width = self.settings["crop_size"]
        return 3, height, width

    def transform(self) -> Callable[[Any], Tensor]:
        """Makes the function from a PIL image to a float tensor ``(3, H, W)``."""
        if self.library == "timm":
            from timm.data.transforms_factory import create_transform

            timm_transform: Callable[[Any], Tensor] = create_transform(**self.settings)
            return timm_transform
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms._presets import ImageClassification

        mode = InterpolationMode(self.settings["interpolation"])
        transform: Callable[[Any], Tensor] = ImageClassification(
            **{**self.settings, "interpolation": mode}
        )
        return transform

    def changed(
        self,
        *,
        size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> Preprocessing:
        """A copy with another image size (height and width, pixels), mean or std; None keeps."""
        settings = dict(self.settings)
        if mean is not None:
            settings["mean"] = tuple(mean)
        if std is not None:
            settings["std"] = tuple(std)
        if size is not None and self.library == "timm":
            settings["input_size"] = (3, size, size)
        elif size is not None:
            settings |= {"crop_size": size, "resize_size": round(size / _CROP)}
        return dataclasses.replace(self, settings=settings)

    def to_json(self) -> str:
        """JSON text of ``preprocessing.json``."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1)


def plain_preprocessing(
    model: str, size: int, mean: Sequence[float], std: Sequence[float]
) -> Preprocessing:
    """Preprocessing that resizes the shorter side to ``size * 256 / 224`` and crops the centre.

    Args:
        model: name of the model.
        size: height and width of the crop, pixels.
        mean: mean of the red, green and blue values in 0..1.
        std: standard deviation of these values.
    """
    settings = {"interpolation": "bilinear"}
    plain = Preprocessing(model=model, library="torchvision", settings=settings)
    return plain.changed(size=size, mean=mean, std=std)


def timm_preprocessing(name: str) -> Preprocessing:
    """The preprocessing that the default weights of a timm model were evaluated with."""
    import timm
    from timm.data.config import resolve_data_config

    resolve: Callable[..., dict[str, Any]] = resolve_data_config
    config = timm.get_pretrained_cfg(name)
    # Where timm has no weights, an empty value selects ImageNet's usual settings.
    fields = {"mean": None} if config is None else dataclasses.asdict(config)
    settings = resolve({}, pretrained_cfg=fields)
    return Preprocessing(model=f"timm/{name}", library="timm", settings=settings)


def torchvision_preprocessing(name: str) -> Preprocessing:
    """The transform of the default weights of a torchvision model."""
    import torchvision

    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    settings = {
        "crop_size": preset.crop_size[0],
        "resize_size": preset.resize_size[0],
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "interpolation": preset.interpolation.value,
    }
    return Preprocessing(model=f"torchvision/{name}", library="torchvision", settings=settings)


def read_preprocessing(path: Path) -> Preprocessing:
    """Reads the file that ``fxquant compile`` wrote.

    Raises:
        FileFormatError: the file is truncated or foreign.
        DataError: the file cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        file_format = values.pop("format")
        if file_format != FORMAT:
            raise FileFormatError(
                f"{path} is not of format {FORMAT}; compile the model again",
                got=file_format,
                expected=FORMAT,
            )
        preprocessing = Preprocessing(**values)
        preprocessing.transform()
        assert len(preprocessing.image_shape) == 3
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", got=path) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, DataError) as error:
        raise FileFormatError(
            f"{path} is damaged ({type(error).__name__}: {error}); compile the model again, or "
            "remove the file and give --model",
            got=path,
        ) from error
    return preprocessing
