"""What the tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fxquant.cli import main

VIT = "timm/vit_tiny_patch16_224"
TINY = {"depth": 1, "img_size": 32, "embed_dim": 32, "num_heads": 2, "num_classes": 7}
ARGS = ["--model-arg", *(f"{key}={value}" for key, value in TINY.items())]


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def draw_classes(folder: Path) -> Path:
    """Seven class folders of two images each."""
    for i in range(14):
        draw(folder / f"class{i % 7}" / f"{i}.png", i)
    return folder


def draw_flat(folder: Path) -> Path:
    """Three images, and a file that is not an image."""
    for i in range(3):
        draw(folder / f"{i}.jpg", i)
    (folder / "notes.txt").write_text("no image")
    return folder


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The message of a command that ends with exit code 2 and no traceback."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") or "\nerror: " in captured.err
    assert "Traceback" not in captured.err
    return captured.err
