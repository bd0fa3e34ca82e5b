"""Small configurations of every supported model family, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import timm
import torch
import torchvision.models as tv
from timm.models.byobnet import ByobNet
from timm.models.mobilevit import model_cfgs
from torch import nn
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

from fxquant.passes import Pass, PassResult, run_passes
from fxquant.testing import relative_error
from tests.helpers.stages import canonical


@dataclass(frozen=True)
class Family:
    """A model family: its name, how to build a small one, and its image size."""

    name: str
    build: Callable[[], nn.Module]
    image: tuple[int, int, int]

    def model(self) -> nn.Module:
        """The model in eval mode, the same at every call.

        Everything is moved a little, so that nothing is trivial as at initialisation: biases of
        zero, norms of one, batch statistics alike, layer scales of 1e-5.
        """
        torch.manual_seed(0)
        model = self.build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.running_mean.normal_(std=0.1)
                    module.running_var.uniform_(0.5, 1.5)
        return model


def _timm(name: str, size: int, **options: object) -> Family:
    return Family(name, partial(timm.create_model, name, **options), (3, size, size))


def _mobilevit() -> nn.Module:
    """timm's, its first transformer stage the last."""
    config = model_cfgs["mobilevit_xxs"]
    return ByobNet(replace(config, blocks=config.blocks[:3]), num_classes=10)


FAMILIES: tuple[Family, ...] = (
    _timm("vit_tiny_patch16_224", 64, img_size=64, depth=2),
    _timm("deit3_small_patch16_224", 64, img_size=64, depth=2),
    _timm(
        "swin_tiny_patch4_window7_224",
        56,
        img_size=56,
        embed_dim=48,
        depths=(2, 2),
        num_heads=(3, 6),
    ),
    _timm(
        "swinv2_tiny_window8_256",
        64,
        img_size=64,
        embed_dim=48,
        depths=(2, 2),
        num_heads=(3, 6),
    ),
    _timm("beit_base_patch16_224", 64, img_size=64, depth=1, embed_dim=96, num_heads=3),
    _timm("eva02_tiny_patch14_224", 56, img_size=56, depth=1),
    _timm("cait_xxs24_224", 64, img_size=64, depth=1),
    _timm("pvt_v2_b0", 64, depths=(1, 1, 1, 1)),
    _timm("levit_128s", 224, depth=(1, 1, 1)),
    _timm("maxvit_rmlp_pico_rw_256", 128, img_size=128, depths=(1, 1), embed_dim=(32, 64)),
    Family("mobilevit_xxs", _mobilevit, (3, 64, 64)),
    _timm("convnext_atto", 64, depths=(1, 1, 1, 1)),
    _timm("vit_small_patch14_dinov2", 56, img_size=56, depth=1, num_classes=10),
    Family(
        "torchvision vit",
        partial(tv.VisionTransformer, 64, 16, 1, 3, 96, 192, num_classes=10),
        (3, 64, 64),
    ),
    Family(
        "torchvision swin",
        partial(tv.SwinTransformer, [4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10),
        (3, 32, 32),
    ),
    Family(
        "torchvision swin_v2",
        partial(
            tv.SwinTransformer,
            [4, 4],
            24,
            [2, 2],
            [2, 4],
            [4, 4],
            num_classes=10,
            block=SwinTransformerBlockV2,
            downsample_layer=PatchMergingV2,
        ),
        (3, 32, 32),
    ),
    Family(
        "torchvision maxvit",
        partial(
            tv.MaxVit,
            (64, 64),
            stem_channels=16,
            partition_size=4,
            block_channels=[16, 32],
            block_layers=[1, 1],
            head_dim=16,
            stochastic_depth_prob=0.0,
            num_classes=10,
        ),
        (3, 64, 64),
    ),
)


def run_on_family(family: Family, item: Pass) -> PassResult:
    """Runs a pass on a canonical graph of a family, whose function has to stay."""
    model, x = family.model(), torch.randn(1, *family.image)
    gm = canonical(model, torch.randn(2, *family.image), seed=False)
    result = run_passes(gm, [item])[type(item).__name__]
    with torch.no_grad():
        assert relative_error(gm(x), model(x)) < 1e-5
    return result
