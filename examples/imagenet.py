"""Top-1 on ImageNet, next to the figures of the PTQ4ViT paper (arXiv 2111.12293, table 1).

    python examples/imagenet.py --data imagenet --models ViT-S/16 DeiT-S

The folder ``imagenet`` holds ``train`` and ``val``, each with one folder per class (sorted by
WordNet id). timm's weights are downloaded by their tag. 32 training images are used for
calibration. The paper's float figures are of the checkpoints of its time: compare the loss of
accuracy, not only the figures.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder

import fxquant
from fxquant import Policy, policies
from fxquant.utils.progress import track

WIDTHS = (8, 6)


@dataclass(frozen=True)
class Published:
    """A row of the paper: the timm checkpoint, and top-1 in percent, float, W8A8 and W6A6."""

    tag: str
    top1: tuple[float, float, float]


PAPER = {
    "ViT-S/16": Published("vit_small_patch16_224.augreg_in21k_ft_in1k", (81.39, 81.00, 78.63)),
    "ViT-B/16": Published("vit_base_patch16_224.augreg_in21k_ft_in1k", (84.54, 84.25, 81.65)),
    "DeiT-S": Published("deit_small_patch16_224.fb_in1k", (79.80, 79.47, 76.28)),
    "DeiT-B": Published("deit_base_patch16_224.fb_in1k", (81.80, 81.48, 80.25)),
    "Swin-T": Published("swin_tiny_patch4_window7_224.ms_in1k", (81.39, 81.24, 80.47)),
    "Swin-S": Published("swin_small_patch4_window7_224.ms_in1k", (83.23, 83.10, 82.38)),
    "Swin-B": Published("swin_base_patch4_window7_224.ms_in22k_ft_in1k", (85.27, 85.14, 84.01)),
}
METHODS = {
    "minmax": policies.minmax,
    "base_ptq": policies.base_ptq,
    "ptq4vit": policies.ptq4vit,
}


def loader(folder: Path, model: nn.Module, options: argparse.Namespace, count: int) -> DataLoader:
    """A loader of images in the model's form; ``count`` drawn at random, 0 for all in order."""
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    data = ImageFolder(str(folder), transform)
    if count:
        generator = torch.Generator().manual_seed(options.seed)
        data = Subset(data, torch.randperm(len(data), generator=generator)[:count].tolist())
    return DataLoader(data, batch_size=options.batch_size, num_workers=options.workers)


@torch.inference_mode()
def top1(model: nn.Module, data: DataLoader, device: str, label: str) -> float:
    """Top-1 accuracy in percent."""
    right = seen = 0
    for images, labels in track(data, label=label, total=len(data)):
        right += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
        seen += len(labels)
    return 100 * right / seen


def main() -> None:
    """Prints a table of all models, methods and widths."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with train and val")
    parser.add_argument(
        "--models", nargs="+", default=list(PAPER), help=f"{', '.join(PAPER)}, or any of timm"
    )
    parser.add_argument("--methods", nargs="+", default=["ptq4vit"], choices=list(METHODS))
    parser.add_argument("--calibration", type=int, default=32, help="images of train")
    parser.add_argument("--images", type=int, default=0, help="of val, at random; 0 for all")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--random-weights", action="store_true", help="try it without weights")
    options = parser.parse_args()
    for folder in (options.data / "train", options.data / "val"):  # before weights are downloaded
        if not any(path.is_dir() for path in folder.glob("*")):
            parser.error(f"--data: {folder} is to hold a folder of images for each class")
    table = Table("model", "method", "bits", "top-1 %", "lost", "paper: top-1 %", "lost")
    for name in options.models:
        known = PAPER.get(name)
        tag = known.tag if known else name
        model = timm.create_model(tag, pretrained=not options.random_weights).eval()
        model = model.to(options.device)
        held_out = loader(options.data / "val", model, options, options.images)
        exact = top1(model, held_out, options.device, f"{name} float")
        paper = known.top1 if known else None
        table.add_row(name, "float32", "32", f"{exact:.2f}", "", f"{paper[0]}" if paper else "")
        for method in options.methods:
            for i, bits in enumerate(WIDTHS, start=1):
                policy: Policy = METHODS[method](bits, bits)
                images = loader(options.data / "train", model, options, options.calibration)
                compiled = fxquant.compile(model, images, policy, progress=True)
                found = top1(compiled, held_out, options.device, policy.name)
                row = [name, method, str(bits), f"{found:.2f}", f"{exact - found:.2f}"]
                if paper and method == "ptq4vit":
                    row += [f"{paper[i]:.2f}", f"{paper[0] - paper[i]:.2f}"]
                table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
