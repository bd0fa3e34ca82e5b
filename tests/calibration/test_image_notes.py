"""Calibration images that look unlike images get a note."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fxquant
from fxquant import policies
from fxquant.calibration.image_notes import image_notes
from fxquant.demo.glyphs import GlyphDataset
from fxquant.demo.models import build


def glyphs(count: int = 8) -> Tensor:
    data = GlyphDataset("calib", count)
    return torch.stack([data[i][0] for i in range(count)])


def noise(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_drawings_have_no_note() -> None:
    assert image_notes(glyphs()) == ()


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (noise(), "look like noise"),
        (torch.zeros(4, 3, 32, 32), "4 of the first 4 are constant"),
        (torch.cat([torch.zeros(1, 3, 64, 64), glyphs(5)]), "1 of the first 6 are constant"),
        (glyphs(1).expand(6, -1, -1, -1), "the first 6 are all alike"),
        (255 * glyphs().clamp(0, 1), "values reach 255: normalise"),
    ],
)
def test_odd_images_are_named(images: Tensor, sentence: str) -> None:
    (note,) = image_notes(images)
    assert sentence in note.reason and note.site == "calibration images"


@pytest.mark.parametrize(
    "images", [noise(3), noise()[..., :8], torch.zeros(8, 5, 16), torch.zeros(8, 32)]
)
def test_too_little_to_tell(images: Tensor) -> None:
    assert image_notes(images) == ()


def test_the_report_has_the_note() -> None:
    model = build("glyph_vit")
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    notes = fxquant.compile(model, [images], policies.minmax()).report.notes
    assert any("look like noise" in note.reason and note.step == "capture" for note in notes)
