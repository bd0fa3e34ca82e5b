r"""Train the demo transformers on glyph images, on a CPU, in under an hour each.

Training that starts on hard images stays on a plateau for a long time. The following measures leave
the plateau cheaply:

* The difficulty rises smoothly, from centred white glyphs to the full augmentation.
* The 950 fine-grained logits start as a sum of 50 glyph logits and 19 font logits. The softmax of
  such a sum is a product: the two small heads train on every image of a glyph or of a font. Near
  the end the sum is written out as a full 950-class head, which is then trained itself.
* The ViT sees only the half of its patches that hold the ink until near the end.
* Matrices inside the blocks are trained with Muon (orthogonalised momentum), the rest with AdamW.

    python examples/train_glyphs.py --model glyph_vit --out glyph_vit.safetensors --minutes 49
    python examples/train_glyphs.py --model glyph_swin --out glyph_swin.safetensors --minutes 30 \
        --batch 64 --easy-until 0.12 --hard-from 0.6 --fine-from 0.8
    python examples/train_glyphs.py --model glyph_vit --out glyph_vit.safetensors --eval-only
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from fxquant.demo.glyphs import FONTS, GLYPHS, Augmentation, GlyphDataset, normalise, render
from fxquant.demo.models import NAMES, build, build_untrained

Model = VisionTransformer | SwinTransformer
PATCH = 8  # pixels, of the ViT
TEST_IMAGES = 4750  # five of each class


@dataclasses.dataclass(frozen=True)
class Plan:
    """Settings of a training; the shares are of the whole time.

    Attributes:
        minutes: wall-clock time of the training.
        seed: seed of the initial weights and of the training images.
        batch: images per step.
        part: images per piece of a batch that one thread works on.
        easy_until: share after which the images begin to get harder.
        hard_from: share from which on the images are as hard as the held-out images.
        fine_from: share from which on the 950-class head replaces the two small heads.
        all_patches_from: share from which on the ViT sees all of its patches.
        kept_patches: patches per image that the ViT sees before ``all_patches_from``.
        decay_from: share from which on the learning rates fall, linearly to almost zero.
        warm_up: share in which the learning rates rise from zero.
        adam_rate: learning rate of AdamW.
        muon_rate: learning rate of Muon, in spectral norm per step.
        weight_decay: decoupled weight decay of matrices.
    """

    minutes: float
    seed: int
    batch: int = 96
    part: int = 8
    easy_until: float = 0.06
    hard_from: float = 0.5
    fine_from: float = 0.7
    all_patches_from: float = 0.85
    kept_patches: int = 32
    decay_from: float = 0.45
    warm_up: float = 0.01
    adam_rate: float = 1.5e-3
    muon_rate: float = 0.015
    weight_decay: float = 0.02

    def strength(self, share: float) -> float:
        """Return the augmentation strength after a share of the time."""
        return min(max((share - self.easy_until) / (self.hard_from - self.easy_until), 0.0), 1.0)

    def rate_factor(self, share: float) -> float:
        """Return the factor of the learning rates after a share of the time."""
        rise = share / self.warm_up
        fall = (1.0 - share) / (1.0 - self.decay_from)
        return max(min(rise, fall, 1.0), 0.005)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is replaced by the nearest orthogonal matrix.

    torch.optim.Muon computes in bfloat16, which CPUs without bfloat16 units emulate slowly.
    """

    def __init__(
        self, matrices: Iterable[tuple[Tensor, int]], rate: float, weight_decay: float
    ) -> None:
        """Take (matrix, number of matrices stacked in its rows) pairs."""
        groups = [{"params": [matrix], "stacked": stacked} for matrix, stacked in matrices]
        super().__init__(groups, {"lr": rate, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix from its gradient."""
        for group in self.param_groups:
            (matrix,) = group["params"]
            if not self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
            momentum = self.state[matrix]["momentum"]
            momentum.lerp_(matrix.grad, 0.05)
            update = matrix.grad.lerp(momentum, 0.95)
            parts = update.reshape(group["stacked"], -1, update.shape[1])
            rows, columns = parts.shape[1:]
            scale = max(1.0, rows / columns) ** 0.5
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            matrix.add_(_orthogonalised(parts).reshape_as(matrix), alpha=-group["lr"] * scale)


def _orthogonalised(matrices: Tensor) -> Tensor:
    """Push the singular values of (b, rows, columns) matrices towards 1, by Newton-Schulz."""
    tall = matrices.shape[1] > matrices.shape[2]
    x: Tensor = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        # A quintic that is steep at 0: five rounds lift small singular values to about 1.
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class SmallHeads(nn.Module):
    """A glyph head and a font head, whose sum replaces the 950-class head."""

    def __init__(self, features: int) -> None:
        """Initialise both heads with small weights."""
        super().__init__()
        self.glyph = nn.Linear(features, len(GLYPHS))
        self.font = nn.Linear(features, len(FONTS))
        for head in (self.glyph, self.font):
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the 950-class cross-entropy, the sum of the cross-entropies of both heads."""
        glyphs = functional.cross_entropy(self.glyph(features), labels // len(FONTS))
        return glyphs + functional.cross_entropy(self.font(features), labels % len(FONTS))

    @torch.no_grad()
    def write_out(self, head: nn.Linear) -> None:
        """Write the sum of both heads into a 950-class head."""
        weight = self.glyph.weight[:, None] + self.font.weight[None]
        head.weight.copy_(weight.flatten(0, 1))
        head.bias.copy_((self.glyph.bias[:, None] + self.font.bias[None]).flatten())


def pooled_features(model: Model, images: Tensor, kept_patches: int | None) -> Tensor:
    """Return the input of the classifier, shape (n, features).

    Args:
        model: the ViT or the Swin.
        images: normalised, shape (n, 3, 64, 64).
        kept_patches: number of patches with the most ink that a ViT sees, or None for all.
    """
    if kept_patches is None or not isinstance(model, VisionTransformer):
        return model.forward_head(model.forward_features(images), pre_logits=True)
    patches = functional.unfold(images.mean(1, keepdim=True), PATCH, stride=PATCH)
    kept = patches.var(1).topk(kept_patches, dim=1).indices
    tokens = model.patch_embed(images) + model.pos_embed
    tokens = tokens.gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))
    return model.forward_head(model.norm(model.blocks(tokens)), pre_logits=True)


def make_optimizers(
    model: Model, heads: SmallHeads, plan: Plan
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Give the matrices inside the blocks to Muon and everything else to AdamW."""
    inner: list[tuple[Tensor, int]] = []
    outer: list[Tensor] = []
    for name, parameter in itertools.chain(model.named_parameters(), heads.named_parameters()):
        is_inner = "blocks." in name or "reduction" in name
        if is_inner and parameter.ndim == 2 and "relative_position" not in name:
            inner.append((parameter, 3 if "qkv" in name else 1))
        else:
            outer.append(parameter)
    matrices = {"params": [p for p in outer if p.ndim > 1], "weight_decay": plan.weight_decay}
    vectors = {"params": [p for p in outer if p.ndim <= 1], "weight_decay": 0.0}
    adam = torch.optim.AdamW([matrices, vectors], lr=plan.adam_rate, betas=(0.9, 0.98))
    return Muon(inner, plan.muon_rate, plan.weight_decay), adam


def training_indices(plan: Plan) -> Iterator[tuple[float, list[int]]]:
    """Yield the share of the time gone and the images to train on, until the time is up."""
    start = time.monotonic()
    order = torch.Generator().manual_seed(plan.seed)
    for first in itertools.count(0, plan.batch):
        share = (time.monotonic() - start) / (60 * plan.minutes)
        if share >= 1:
            return
        # Random offsets, since consecutive indices would show the classes in a fixed order.
        offsets = torch.randint(950, (plan.batch,), generator=order)
        yield share, (first * 950 + offsets).tolist()


def add_gradients(
    model: Model, heads: SmallHeads, plan: Plan, share: float, indices: Sequence[int]
) -> float:
    """Add the gradients of a piece of a batch; return its share of the batch's mean loss."""
    level = Augmentation().scaled(plan.strength(share))
    images, labels = render("train", indices, seed=plan.seed, level=level)
    kept = plan.kept_patches if share < plan.all_patches_from else None
    features = pooled_features(model, normalise(images), kept)
    targets = torch.from_numpy(labels)
    if share >= plan.fine_from:
        loss = functional.cross_entropy(model.get_classifier()(features), targets)
    else:
        loss = heads.loss(features, targets)
    loss = loss * (len(indices) / plan.batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


def train(name: str, plan: Plan, threads: int, console: Console) -> Model:
    """Train a model from random weights and return it.

    The batch is cut into small pieces that single-threaded workers fetch when they are free. On a
    shared machine this is much faster than threads that wait for each other inside every operation.
    """
    torch.manual_seed(plan.seed)
    model = build_untrained(name)
    classifier = model.get_classifier()
    heads = SmallHeads(classifier.in_features)
    optimizers = make_optimizers(model, heads, plan)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    written_out = False
    mean_loss, start = 0.0, time.monotonic()
    with ThreadPoolExecutor(threads, initializer=set_up_thread) as workers:
        for step, (share, indices) in enumerate(training_indices(plan)):
            if not written_out and share >= plan.fine_from:
                heads.write_out(classifier)
                written_out = True
            parts = [indices[at : at + plan.part] for at in range(0, plan.batch, plan.part)]
            loss = sum(workers.map(partial(add_gradients, model, heads, plan, share), parts))
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * plan.rate_factor(share)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            mean_loss += (loss - mean_loss) * max(0.02, 1 / (step + 1))
            if step % 50 == 0:
                seconds = time.monotonic() - start
                console.print(
                    f"{seconds:6.0f} s  step {step:5d}  {plan.batch * (step + 1) / seconds:4.0f} "
                    f"images/s  difficulty {plan.strength(share):.2f}  loss {mean_loss:.3f}"
                )
    return model


def set_up_thread() -> None:
    """Run the operations of this thread single-threaded and without denormal numbers."""
    torch.set_num_threads(1)
    # Denormal numbers, of which sharp softmaxes have many, slow some CPUs down tenfold.
    torch.set_flush_denormal(True)


@torch.no_grad()
def accuracy(model: Model, length: int = TEST_IMAGES) -> float:
    """Return the share of held-out images whose class the model ranks first."""
    data = GlyphDataset("test", length)
    correct = 0
    for first in range(0, length, 250):
        images, labels = data.batch(range(first, min(first + 250, length)))
        correct += int((model(images).argmax(1) == labels).sum())
    return correct / length


def save_half(model: Model, path: Path) -> None:
    """Save a model's weights as float16."""
    halves = {key: value.to(torch.float16) for key, value in model.state_dict().items()}
    save_file(halves, path)


def main() -> None:
    """Train and save one model, or evaluate a saved one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=NAMES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="safetensors file of the weights")
    parser.add_argument("--minutes", type=float, default=45.0, help="time to train for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=Plan.batch, help="images per step")
    parser.add_argument("--easy-until", type=float, default=Plan.easy_until, help="share of time")
    parser.add_argument("--hard-from", type=float, default=Plan.hard_from, help="share of time")
    parser.add_argument("--fine-from", type=float, default=Plan.fine_from, help="share of time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--eval-only", action="store_true", help="evaluate the file at --out")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    set_up_thread()
    if not arguments.eval_only:
        plan = Plan(
            minutes=arguments.minutes,
            seed=arguments.seed,
            batch=arguments.batch,
            easy_until=arguments.easy_until,
            hard_from=arguments.hard_from,
            fine_from=arguments.fine_from,
        )
        console.print(str(plan))
        save_half(train(arguments.model, plan, arguments.threads, console), arguments.out)
    torch.set_num_threads(arguments.threads)
    top1 = accuracy(build(arguments.model, arguments.out))
    console.print(f"{arguments.model}: held-out top-1 {top1:.2%} of {TEST_IMAGES} images")


if __name__ == "__main__":
    main()
