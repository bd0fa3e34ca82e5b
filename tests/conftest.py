"""Settings and tiny models shared by the tests."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest
import timm
import torch
from torch import nn

import fxquant
from fxquant.testing import images
from tests.helpers.cli_helpers import draw_classes, draw_flat

# Tests run in several processes; more threads than cores wait for one another at every product.
torch.set_num_threads(1)
# Runs of torch code vary in time on a busy machine, so a deadline would only make tests flaky.
hypothesis.settings.register_profile("fxquant", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("fxquant")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def vit() -> nn.Module:
    """timm's ViT, one block, on images of 16 x 16."""
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        embed_dim=16,
        depth=1,
        num_heads=2,
        num_classes=5,
    ).eval()


@pytest.fixture(scope="session")
def quantized(vit: nn.Module) -> fxquant.CompiledModel:
    """The ViT compiled by the default policy on four images; not to be changed."""
    return fxquant.compile(vit, [images(4, 16)])


@pytest.fixture(scope="session")
def swin() -> nn.Module:
    """timm's Swin, one stage of a plain and a shifted block, on images of 32 x 32."""
    torch.manual_seed(0)
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        embed_dim=16,
        depths=(2,),
        num_heads=(2,),
        num_classes=5,
    ).eval()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_classes(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_flat(tmp_path_factory.mktemp("flat"))
