"""Tests of the glyph data set and of the demo models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fxquant.demo.glyphs import (
    GLYPHS,
    NUM_CLASSES,
    Augmentation,
    GlyphDataset,
    class_name,
    labels_of,
    normalise,
    render,
)
from fxquant.demo.models import NAMES, build

FLOORS = {"glyph_vit": 0.85, "glyph_swin": 0.82}


def test_an_image_depends_on_its_index_alone() -> None:
    together, labels = render("test", range(20))
    alone, label = render("test", [13])
    assert together.shape == (20, 64, 64, 3)
    assert together.dtype == np.uint8
    np.testing.assert_array_equal(together[13], alone[0])
    assert labels[13] == label[0]


def test_splits_and_seeds_differ() -> None:
    variants = [render("train", range(8))[0], render("calib", range(8))[0]]
    variants += [render("test", range(8))[0], render("test", range(8), seed=1)[0]]
    for row, one in enumerate(variants):
        for other in variants[:row]:
            assert (one != other).any(axis=(1, 2, 3)).all()


def test_labels_are_balanced_and_in_range() -> None:
    fine = labels_of(range(1900))
    assert (np.bincount(fine, minlength=950) == 2).all()
    coarse = labels_of(range(1900), "glyph")
    assert (np.bincount(coarse, minlength=50) == 38).all()
    assert [class_name(label)[0] for label in fine] == [GLYPHS[label] for label in coarse]


def test_easy_images_are_centred_and_white_on_black() -> None:
    images, _ = render("test", range(0, 950, 19), level="easy")
    assert (images[:, :8] == 0).all()
    assert (images.max(axis=(1, 2, 3)) > 200).all()
    ink = images[..., 0] > 64
    for axis in (1, 2):
        profile = ink.any(axis=3 - axis)
        first, last = profile.argmax(1), 63 - profile[:, ::-1].argmax(1)
        assert (abs(first + last - 63) <= 5).all()


def test_no_two_classes_look_alike() -> None:
    images, labels = render("test", range(NUM_CLASSES["glyph_font"]), level="easy")
    ink = images[..., 0].reshape(len(images), -1).astype(np.float32) / 255
    power = (ink**2).sum(1)
    distance = (power[:, None] + power - 2 * ink @ ink.T) / np.sqrt(np.outer(power, power))
    np.fill_diagonal(distance, np.inf)
    first, second = divmod(int(distance.argmin()), len(images))
    pair = class_name(int(labels[first])), class_name(int(labels[second]))
    assert distance.min() > 0.05, f"{pair} look alike"


def test_dataset_works_with_a_loader() -> None:
    data = GlyphDataset("calib", 10, target="glyph")
    images, labels = next(iter(DataLoader(data, batch_size=10)))
    assert images.shape == (10, 3, 64, 64)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 2
    assert torch.equal(images, data.batch(range(10))[0])
    assert torch.equal(images, normalise(render("calib", range(10))[0]))
    assert len(data) == 10
    assert int(labels.max()) < 50
    with pytest.raises(IndexError, match="10 images"):
        data[10]


def test_errors_say_what_to_pass() -> None:
    with pytest.raises(ValueError, match="'train', 'calib', 'test'"):
        GlyphDataset("val", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'easy', 'augmented'"):
        render("test", [0], level="hard")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 or more"):
        render("test", [-1])
    with pytest.raises(ValueError, match=r"0 .* to 1"):
        Augmentation().scaled(2)
    with pytest.raises(ValueError, match="glyph_vit, glyph_swin"):
        build("resnet")


@pytest.mark.parametrize("name", NAMES)
def test_demo_model_is_accurate(name: str) -> None:
    model = build(name)
    assert not model.training
    assert all(value.dtype == torch.float32 for value in model.parameters())
    images, labels = GlyphDataset("test", 200).batch(range(200))
    with torch.no_grad():
        top1 = (model(images).argmax(1) == labels).float().mean().item()
    assert top1 >= FLOORS[name]
