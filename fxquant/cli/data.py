"""Images of a folder, or of the demo, in batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from fxquant.cli.preprocess import Preprocessing
from fxquant.errors import DataError

DEMO = "demo"
# Default number of glyph images for evaluation.
DEMO_IMAGES = 1000
DEMO_SHAPE = (3, 64, 64)
Split = Literal["calib", "test"]
Batches = DataLoader[tuple[Tensor, Tensor]]


def read_image(path: str | Path) -> Image.Image:
    """Reads an image file as RGB; 16 bits of gray are scaled to 8.

    Raises:
        DataError: the file is not an image, is damaged, or has numbers of unknown range; the
            message names it.
    """
    try:
        with Image.open(path) as image:
            # Pillow would clip these at 255. Older versions open a PNG of 16 bits as "I".
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
                values = np.asarray(image).astype(np.float64) / 257
                return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")
            if image.mode in ("I", "F"):
                raise ValueError("its 32-bit numbers have no known range")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} cannot be read as an image ({error}); repair or remove the file", got=path
        ) from error


class FlatFolder(Dataset[tuple[Tensor, int]]):
    """Images directly in a folder, all labelled -1.

    Args:
        folder: folder of the images.
        transform: function from a PIL image to a tensor.
    """

    def __init__(self, folder: Path, transform: Callable[[Any], Tensor]) -> None:
        self.paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMG_EXTENSIONS)
        self._transform = transform

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The image as a tensor, and -1."""
        return self._transform(read_image(self.paths[index])), -1


def open_data(
    name: str,
    preprocessing: Preprocessing,
    *,
    labelled: bool,
    split: Split = "test",
    count: int | None = None,
) -> Dataset[Any]:
    """The data set that ``--data`` names.

    Args:
        name: a folder with one subfolder per class, a folder of images, or ``demo``.
        preprocessing: preprocessing of the model; demo images need none.
        labelled: whether classes are needed.
        split: split of the demo, ``calib`` or ``test``.
        count: number of demo images; None is ``DEMO_IMAGES``.

    Raises:
        DataError: the folder is missing or empty, or lacks the classes that are needed.
    """
    if name == DEMO:
        return _demo_data(preprocessing, split, count or DEMO_IMAGES)
    folder = Path(name)
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise DataError(
            f"--data {folder} {problem}; give a folder of images, or `{DEMO}`", got=folder
        )
    try:
        data = _folder_data(folder, preprocessing.transform())
    except OSError as error:
        raise DataError(
            f"--data {folder} cannot be read: {error.strerror or error}", got=folder
        ) from error
    if not len(data):
        raise DataError(
            f"--data {folder} holds no images, directly or in subfolders; expected files ending "
            f"in {', '.join(IMG_EXTENSIONS)}",
            got=folder,
            expected=IMG_EXTENSIONS,
        )
    if labelled:
        check_labelled(name, data)
    return data


def check_labelled(name: str, data: Dataset[Any]) -> None:
    """Checks that images have classes.

    Args:
        name: the folder that ``--data`` names.
        data: the images of the folder.

    Raises:
        DataError: the folder has no subfolders.
    """
    if isinstance(data, FlatFolder):
        raise DataError(
            f"--data {name} has images but no subfolders of images; accuracy needs one "
            "subfolder per class, sorted by name in the order of the model's outputs",
            got=name,
        )


def _folder_data(folder: Path, transform: Callable[[Any], Tensor]) -> ImageFolder | FlatFolder:
    if any(path.is_dir() for path in folder.iterdir()):
        data = ImageFolder(str(folder), transform, loader=read_image, allow_empty=True)
        if len(data):
            return data
    return FlatFolder(folder, transform)


def _demo_data(preprocessing: Preprocessing, split: Split, count: int) -> Dataset[Any]:
    if preprocessing.image_shape != DEMO_SHAPE:
        raise DataError(
            f"--data {DEMO} has images of shape {DEMO_SHAPE}, {preprocessing.model} takes "
            f"{preprocessing.image_shape}; give a folder of images",
            got=DEMO_SHAPE,
            expected=preprocessing.image_shape,
        )
    from fxquant.demo.glyphs import GlyphDataset

    data: Dataset[Any] = GlyphDataset(split, count)
    return data


def batches(data: Dataset[Any], count: int | None, size: int, seed: int) -> Batches:
    """A loader of batches of a data set.

    Args:
        data: map-style data set.
        count: number of images, chosen at random, in random order; None loads all in order.
        size: images per batch.
        seed: seed of the choice.
    """
    total: int = len(data)  # type: ignore[arg-type]
    if count is not None:
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        data = Subset(data, order[:count].tolist())
    return DataLoader(data, batch_size=size)
