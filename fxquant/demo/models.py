"""The two small trained transformers that ship with the package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from fxquant.demo.glyphs import IMAGE_SIZE, NUM_CLASSES
from fxquant.utils.files import as_path

_WEIGHTS: Final = Path(__file__).parent / "weights"


def _glyph_vit() -> VisionTransformer:
    return VisionTransformer(
        img_size=IMAGE_SIZE,
        patch_size=8,
        embed_dim=192,
        depth=6,
        num_heads=3,
        num_classes=NUM_CLASSES["glyph_font"],
        global_pool="avg",
        class_token=False,
    )


def _glyph_swin() -> SwinTransformer:
    return SwinTransformer(
        img_size=IMAGE_SIZE,
        patch_size=4,
        window_size=4,
        embed_dim=48,
        depths=(2, 2, 4),
        num_heads=(2, 4, 8),
        num_classes=NUM_CLASSES["glyph_font"],
        drop_path_rate=0.0,
    )


_BUILDERS: Final[dict[str, Callable[[], VisionTransformer | SwinTransformer]]] = {
    "glyph_vit": _glyph_vit,
    "glyph_swin": _glyph_swin,
}
NAMES: Final[tuple[str, ...]] = tuple(_BUILDERS)


def build_untrained(name: str) -> VisionTransformer | SwinTransformer:
    """Build a demo model with random weights, in training mode.

    Args:
        name: one of ``NAMES``.

    Returns:
        Unmodified timm model from (n, 3, 64, 64) images to (n, 950) logits.
    """
    if name not in _BUILDERS:
        raise ValueError(f"no demo model is called {name!r}; pass one of {', '.join(NAMES)}")
    return _BUILDERS[name]()


def build(name: str, weights: str | Path | None = None) -> VisionTransformer | SwinTransformer:
    """Build a demo model with trained weights, in float32 and evaluation mode.

    Args:
        name: one of ``NAMES``.
        weights: a safetensors file to load instead of the one in the package.

    Returns:
        Unmodified timm model from normalised (n, 3, 64, 64) images to (n, 950) logits.
    """
    model = build_untrained(name)
    path = _WEIGHTS / f"{name}.safetensors" if weights is None else as_path(weights, "weights")
    if not path.is_file():
        raise FileNotFoundError(
            f"the weights {path} are missing; reinstall fxquant, or make them with "
            f"examples/train_glyphs.py --model {name} --out {path}"
        )
    state = {key: value.to(torch.float32) for key, value in load_file(path).items()}
    model.load_state_dict(state)
    return model.eval()
