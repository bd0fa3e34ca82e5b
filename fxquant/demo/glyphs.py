"""Seeded glyph images: fine-grained classification data that needs no download.

Every image shows one glyph in one of the fonts that the installed matplotlib carries. A class is
a glyph in a font (950 classes), or the glyph alone (50 classes). Image ``i`` of a split is a pure
function of ``(seed, split, i)``, so a held-out set is the same on every run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset

Split = Literal["train", "calib", "test"]
Level = Literal["easy", "augmented"]
Target = Literal["glyph", "glyph_font"]

# Excluded: glyphs whose lower and upper case differ only in size, look-alikes (0/O, 1/I/l, p/P),
# and glyphs that two of the fonts draw alike (8, @, %, #, I).
GLYPHS: Final[str] = "ABCDEFGHJKLMNOPQRSTUVWXYZabdefghijkmnqrty2345679&?"

# The upright light DejaVu Sans Mono faces are excluded: most of their glyphs are DejaVu Sans ones.
FONTS: Final[tuple[str, ...]] = (
    "DejaVuSans",
    "DejaVuSans-Oblique",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Italic",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralItalic",
    "STIXGeneralBol",
    "STIXGeneralBolIta",
    "cmr10",
    "cmb10",
    "cmss10",
    "cmtt10",
    "cmti10",
)

IMAGE_SIZE: Final = 64  # pixels, height and width
NUM_CLASSES: Final[dict[Target, int]] = {
    "glyph": len(GLYPHS),
    "glyph_font": len(GLYPHS) * len(FONTS),
}
PIXEL_MEAN: Final = 127.5  # of uint8 values; the same in every channel
PIXEL_STD: Final = 63.75

_SPLIT_CODES: Final[dict[Split, int]] = {"train": 0, "calib": 1, "test": 2}
_CLASS_STEP: Final = 367  # coprime to both class counts, so neighbours in a split differ in class
_NOMINAL_EM: Final = 44.0  # pixels per em in an image before the size augmentation
_MASK_EM: Final = 72  # pixels per em in the cached masks: images shrink them, never enlarge them
_MASK_SIZE: Final = 120  # pixels; holds the widest bold glyph at _MASK_EM


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Ranges that the random part of an image is drawn from, uniformly.

    Attributes:
        rotation: largest rotation either way, in degrees.
        shift: largest shift either way along each axis, in pixels.
        scale_low: smallest glyph size relative to the nominal one.
        scale_high: largest glyph size relative to the nominal one.
        contrast_low: smallest brightness difference of glyph and background (1 is white on black).
        chroma: largest offset either way of each colour channel (1 is the full range).
        dark_on_light: probability that the glyph is darker than the background.
        noise: largest standard deviation of the pixel noise (1 is the full range).
    """

    rotation: float = 15.0
    shift: float = 6.0
    scale_low: float = 0.75
    scale_high: float = 1.15
    contrast_low: float = 0.4
    chroma: float = 0.2
    dark_on_light: float = 0.5
    noise: float = 0.08

    def scaled(self, strength: float) -> Augmentation:
        """Shrink every range towards the plain image.

        Args:
            strength: 0 for a centred white glyph on black, 1 for the ranges as they are.

        Returns:
            The augmentation in between.
        """
        if not 0.0 <= strength <= 1.0:
            raise ValueError(f"strength is {strength}; pass a number from 0 (easy) to 1 (full)")
        return Augmentation(
            rotation=self.rotation * strength,
            shift=self.shift * strength,
            scale_low=1.0 + (self.scale_low - 1.0) * strength,
            scale_high=1.0 + (self.scale_high - 1.0) * strength,
            contrast_low=1.0 + (self.contrast_low - 1.0) * strength,
            chroma=self.chroma * strength,
            dark_on_light=self.dark_on_light * strength,
            noise=self.noise * strength,
        )


LEVELS: Final[dict[Level, Augmentation]] = {
    "easy": Augmentation().scaled(0.0),
    "augmented": Augmentation(),
}


def class_name(label: int, target: Target = "glyph_font") -> str:
    """Return a readable name of a class, such as ``"A DejaVuSans"``."""
    _check_choice("target", target, NUM_CLASSES)
    if not 0 <= label < NUM_CLASSES[target]:
        raise ValueError(f"label is {label}; {target!r} labels are 0 to {NUM_CLASSES[target] - 1}")
    if target == "glyph":
        return GLYPHS[label]
    glyph, font = divmod(label, len(FONTS))
    return f"{GLYPHS[glyph]} {FONTS[font]}"


def labels_of(indices: Iterable[int], target: Target = "glyph_font") -> NDArray[np.int64]:
    """Return the classes of images, which depend on their indices alone.

    Every run of 950 consecutive indices has each glyph-font class once.

    Args:
        indices: image indices, 0 or more.
        target: "glyph" for 50 classes, "glyph_font" for 950.

    Returns:
        The labels, shape (n,).
    """
    _check_choice("target", target, NUM_CLASSES)
    fine = np.fromiter(indices, np.int64) * _CLASS_STEP % NUM_CLASSES["glyph_font"]
    return fine if target == "glyph_font" else fine // len(FONTS)


def render(
    split: Split,
    indices: Iterable[int],
    *,
    seed: int = 0,
    level: Level | Augmentation = "augmented",
    target: Target = "glyph_font",
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw a batch of images.

    Args:
        split: "train", "calib" or "test"; no image is shared between them.
        indices: which images of the split to draw, 0 or more.
        seed: changes every image of every split, 0 or more.
        level: "easy", "augmented", or custom ranges.
        target: what the labels count: "glyph" (50) or "glyph_font" (950).

    Returns:
        The images, uint8 RGB of shape (n, 64, 64, 3), and their labels of shape (n,).
    """
    _check_choice("split", split, _SPLIT_CODES)
    positions = list(indices)
    if seed < 0 or any(index < 0 for index in positions):
        raise ValueError("the seed and every index must be 0 or more")
    augmentation = level if isinstance(level, Augmentation) else _augmentation_of(level)
    images = np.empty((len(positions), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for row, (index, label) in enumerate(zip(positions, labels_of(positions), strict=True)):
        generator = np.random.default_rng((seed, _SPLIT_CODES[split], index))
        images[row] = _draw(int(label), augmentation, generator)
    return images, labels_of(positions, target)


def normalise(images: NDArray[np.uint8]) -> torch.Tensor:
    """Turn rendered images into what the demo models take.

    Args:
        images: uint8 RGB, shape (n, 64, 64, 3).

    Returns:
        Contiguous float32 tensor of shape (n, 3, 64, 64), values from -2 to 2.
    """
    channels_first = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return channels_first.to(torch.float32).sub_(PIXEL_MEAN).div_(PIXEL_STD)


class GlyphDataset(Dataset[tuple[torch.Tensor, int]]):
    """Map-style data set of glyph images, drawn on access.

    Items are a float32 tensor of shape (3, 64, 64), normalised, and an int label.
    """

    def __init__(
        self,
        split: Split,
        length: int,
        *,
        seed: int = 0,
        level: Level | Augmentation = "augmented",
        target: Target = "glyph_font",
    ) -> None:
        """Describe the data set; nothing is drawn yet.

        Args:
            split: "train", "calib" or "test".
            length: number of images, 1 or more.
            seed: changes every image.
            level: "easy", "augmented", or custom ranges.
            target: "glyph" for 50 classes, "glyph_font" for 950.
        """
        _check_choice("split", split, _SPLIT_CODES)
        _check_choice("target", target, NUM_CLASSES)
        if not isinstance(level, Augmentation):
            _augmentation_of(level)
        if length < 1 or seed < 0:
            raise ValueError("the length must be 1 or more, and the seed 0 or more")
        self.split = split
        self.length = length
        self.seed = seed
        self.level = level
        self.target = target

    def __len__(self) -> int:
        """Return the number of images."""
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Draw image ``index``: float32 (3, 64, 64) and its label."""
        index = operator.index(index)
        if index < 0:
            index += self.length
        if not 0 <= index < self.length:
            raise IndexError(f"index is out of range for a data set of {self.length} images")
        images, labels = self.batch((index,))
        return images[0], int(labels[0])

    def batch(self, indices: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw many images at once: float32 (n, 3, 64, 64) and int64 labels (n,)."""
        images, labels = render(
            self.split, indices, seed=self.seed, level=self.level, target=self.target
        )
        return normalise(images), torch.from_numpy(labels)


def _check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    allowed = tuple(choices)
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; pass one of {', '.join(map(repr, allowed))}")


def _augmentation_of(level: Level) -> Augmentation:
    _check_choice("level", level, LEVELS)
    return LEVELS[level]


@functools.cache
def _font(name: str) -> ImageFont.FreeTypeFont:
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    if not path.is_file():
        raise FileNotFoundError(f"the font {path} is missing; reinstall matplotlib with its data")
    return ImageFont.truetype(str(path), _MASK_EM)


@functools.cache
def _mask(label: int) -> Image.Image:
    """Draw a class white on black at high resolution, the box of its text in the middle."""
    glyph, font_index = divmod(label, len(FONTS))
    font = _font(FONTS[font_index])
    left, top, right, bottom = font.getbbox(GLYPHS[glyph])
    mask = Image.new("L", (_MASK_SIZE, _MASK_SIZE))
    corner = ((_MASK_SIZE - left - right) / 2, (_MASK_SIZE - top - bottom) / 2)
    ImageDraw.Draw(mask).text(corner, GLYPHS[glyph], fill=255, font=font)
    return mask


def _warp(mask: Image.Image, augmentation: Augmentation, draws: NDArray[np.float64]) -> Image.Image:
    """Rotate, resize and shift a mask into an image; ``draws`` are 4 numbers from 0 to 1."""
    angle = math.radians(augmentation.rotation) * (2 * draws[0] - 1)
    low, high = augmentation.scale_low, augmentation.scale_high
    step = _MASK_EM / (_NOMINAL_EM * (low + (high - low) * draws[1]))  # mask pixels per pixel
    cosine, sine = step * math.cos(angle), step * math.sin(angle)
    x = IMAGE_SIZE / 2 + augmentation.shift * (2 * draws[2] - 1)
    y = IMAGE_SIZE / 2 + augmentation.shift * (2 * draws[3] - 1)
    middle = _MASK_SIZE / 2
    # PIL needs the map from image to mask coordinates; (x, y) must land on the mask's middle.
    to_mask = (
        cosine,
        sine,
        middle - cosine * x - sine * y,
        -sine,
        cosine,
        middle + sine * x - cosine * y,
    )
    return mask.transform(
        (IMAGE_SIZE, IMAGE_SIZE), Image.Transform.AFFINE, to_mask, Image.Resampling.BILINEAR
    )


def _colours(
    augmentation: Augmentation, draws: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Pick background and glyph colours, shape (3,), 0 to 1; ``draws`` are 9 numbers."""
    contrast = augmentation.contrast_low + (1 - augmentation.contrast_low) * draws[0]
    dark = (1 - contrast) * draws[1]
    shades = (dark, dark + contrast)
    if draws[2] < augmentation.dark_on_light:
        shades = (shades[1], shades[0])
    tint = augmentation.chroma * (2 * draws[3:9].reshape(2, 3) - 1)
    colours = (np.array(shades)[:, None] + tint).clip(0, 1).astype(np.float32)
    return colours[0], colours[1]


def _draw(
    label: int, augmentation: Augmentation, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """Draw one image of a class, uint8 (64, 64, 3)."""
    draws = generator.random(14)
    ink = np.asarray(_warp(_mask(label), augmentation, draws[:4]), np.float32)[:, :, None] / 255
    background, foreground = _colours(augmentation, draws[4:13])
    image = background + ink * (foreground - background)
    if augmentation.noise > 0:
        deviation = augmentation.noise * float(draws[13])
        image += generator.standard_normal(image.shape, np.float32) * np.float32(deviation)
    return (image * 255 + 0.5).clip(0, 255).astype(np.uint8)
