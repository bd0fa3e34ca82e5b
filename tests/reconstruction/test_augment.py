"""Training on images made of those given."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxquant
from fxquant import policies
from fxquant.config.recovery import Reconstruction, Scope
from fxquant.errors import PolicyError
from fxquant.graph.blocks import find_blocks, whole_network
from fxquant.graph.nodes import get_parameter
from fxquant.passes import Reconstruct, run_passes
from fxquant.quantizers import UniformQuantizer
from fxquant.reconstruction import augment, steps, training
from fxquant.reconstruction.augment import augmented, fresh, made_in_folds
from fxquant.reconstruction.blockwise import BlockwiseRunner
from fxquant.reconstruction.image_split import split_images
from fxquant.testing import relative_error, seeded
from tests.helpers.refusals import refused
from tests.helpers.towers import BATCH, SHORT, Tower, frozen, reconstruct

NETWORK = {"scope": "network", "block_loss": "mse"}


SIZES = st.tuples(st.integers(2, 5), st.integers(1, 4), st.integers(4, 9), st.integers(4, 9))


@given(st.integers(1, 9), st.integers(0, 40), st.integers(1, 9))
def test_what_is_made_of_an_image_is_in_its_fold(images: int, count: int, folds: int) -> None:
    own = torch.eye(images)  # each has an axis of its own, and mixing keeps to the axes of both
    folds = min(folds, images)
    found = made_in_folds(own, count, folds)
    assert len(found) == folds and sum(map(len, found)) == images + count
    seen = torch.stack([(fold != 0).any(0) for fold in found])
    assert bool((seen.sum(0) == 1).all())


@given(SIZES, st.integers(0, 99))
def test_images_are_new_and_of_the_same_kind(size: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(size)
    made, again = augmented(x), augmented(x)
    assert made.shape == x.shape
    assert made.dtype is x.dtype
    assert not any(torch.equal(one, two) for one, two in zip(made, x, strict=True))
    assert not torch.equal(made, again)
    low, high = x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)
    assert ((made >= low - 1e-4) & (made <= high + 1e-4)).all()
    torch.manual_seed(seed)
    torch.randn(size)
    assert torch.equal(augmented(x), made)


@given(st.integers(0, 99))
def test_most_is_left_of_an_image(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(64, 3, 8, 8).cumsum(2).cumsum(3)  # smooth, so that moving leaves it alike
    made = augmented(x)
    assert 0.5 < made.std() / x.std() < 1.5
    alike = torch.nn.functional.cosine_similarity(made.flatten(1), x.flatten(1))
    assert alike.median() > 0.7


@given(st.integers(0, 99))
def test_all_channels_are_moved_alike_and_some_images_not_at_all(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(64, 1, 6, 9).expand(-1, 3, -1, -1)
    moved = augment._warped(x)
    assert torch.equal(moved[:, :1].expand_as(moved), moved)
    stayed = (moved == x).flatten(1).all(1).float().mean()
    assert 0.02 < stayed < 0.6
    flat = torch.ones(8, 1, 6, 9) * torch.arange(8.0).view(-1, 1, 1, 1)
    torch.testing.assert_close(augment._warped(flat), flat)


def test_a_turn_is_one_on_images_of_any_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disc stays a disc; a turn of shares of width and height would shear it."""
    monkeypatch.setattr(augment, "_MAX_ROTATION", 0.5)
    for name in ("_MAX_ZOOM", "_MAX_STRETCH", "_WARPED_SHARE"):
        monkeypatch.setattr(augment, name, 1.0)
    monkeypatch.setattr(augment, "_MAX_SHIFT", 0.0)
    across, down = torch.meshgrid(torch.arange(60.0), torch.arange(20.0), indexing="xy")
    across, down = across - 29.5, down - 9.5
    disc = (-(across**2 + down**2) / 20).exp().expand(16, 1, -1, -1)
    ellipse = (-(across**2 + 4 * down**2) / 40).exp().expand(16, 1, -1, -1)
    torch.manual_seed(0)
    assert (augment._warped(disc) - disc).abs().max() < 0.1
    assert (augment._warped(ellipse) - ellipse).abs().amax((1, 2, 3)).max() > 0.2


@given(st.integers(2, 9), st.integers(0, 99))
def test_what_is_no_image_is_mixed_alone(count: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.eye(count).unsqueeze(1)  # (B, 1, B): of which images one is made
    made = augmented(x).squeeze(1)
    assert torch.allclose(made.sum(1), torch.ones(count))
    assert (made.diagonal() >= 0.7).all()
    assert ((made > 0).sum(1) <= 2).all()


def test_the_float_network_says_what_new_images_should_give() -> None:
    gm = frozen()
    model = seeded(Tower())
    context = next(iter(BlockwiseRunner(gm, BATCH).walk(gm, (whole_network(gm),), "walk", 1 << 20)))
    torch.manual_seed(0)
    made = fresh(context, torch.tensor([3, 1]), 11)
    everything = slice(0, 11)
    ((_, x),) = made.quantized_inputs.get(everything, context.device).items()
    ((_, y),) = made.float_outputs.get(everything, context.device).items()
    assert made.count == len(x) == 11
    assert context.quantized_inputs.bytes_per_image == x[0].numel() * 4
    assert torch.allclose(model(x), y, atol=1e-5)


@pytest.mark.parametrize("held_out", [0.0, 0.25])
def test_new_images_bring_the_outputs_nearer(held_out: float) -> None:
    gm = frozen()
    with torch.no_grad():
        exact = seeded(Tower())(BATCH)
        before = (gm(BATCH) - exact).square().mean()
        result = reconstruct(gm, **NETWORK, augment=True, held_out=held_out)
        assert (gm(BATCH) - exact).square().mean() < before
    (gain,) = result.comparisons
    assert gain.error_ratio < 1


def test_images_are_made_anew_in_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def kept(x: torch.Tensor) -> torch.Tensor:
        seen.append(augmented(x))
        return seen[-1]

    monkeypatch.setattr(steps, "augmented", kept)
    # In parts of one image each: they are made before, since some are mixed with others.
    options = {"batch": len(BATCH), "iterations": 5, "held_out": 0.0, "memory_bytes": 1}
    reconstruct(frozen(), **NETWORK, augment=True, **options)
    assert [len(made) for made in seen] == [len(BATCH)] * 5
    for number, made in enumerate(seen):
        own = [row for other in seen[:number] for row in other]
        assert sum(any(torch.equal(row, one) for one in own) for row in made) < 0.5 * len(made) + 8
        assert not any(torch.equal(made, other) for other in seen[:number])


@pytest.mark.parametrize(("held_out", "judges"), [(0.0, 128), (0.25, 6)])
def test_where_no_image_is_held_out_made_ones_judge(
    held_out: float, judges: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    real = training.image_losses

    def looked(block: Any, context: Any, criterion: Any, index: torch.Tensor) -> torch.Tensor:
        ((_, x),) = context.quantized_inputs.get(index, context.device).items()
        seen.append(x)
        return real(block, context, criterion, index)

    monkeypatch.setattr(training, "image_losses", looked)
    reconstruct(frozen(), **NETWORK, augment=True, held_out=held_out, iterations=8)
    assert [len(x) for x in seen] == [judges] * 9
    assert all(torch.equal(x, seen[0]) for x in seen)
    own = [any(torch.equal(x, given) for given in BATCH) for x in seen[0]]
    assert all(own) if held_out else sum(own) < 0.9 * judges


class Seeing(nn.Module):
    """A classifier of small images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(nn.functional.gelu(self.middle(x)).mean(1))


@pytest.mark.parametrize("size", [(3, 8, 8), (3, 6, 10)])
def test_a_network_of_images_comes_nearer_to_the_float_one(size: tuple[int, ...]) -> None:
    model = seeded(Seeing())
    torch.manual_seed(0)
    # Smooth, as what cameras give.
    x, others = torch.nn.functional.avg_pool2d(torch.randn(96, *size), 3, 1, 1).split((32, 64))
    policy = policies.best(3, 3, end_bits=2)
    assert policy.reconstruction is not None
    untrained = replace(policy, reconstruction=None)
    with torch.no_grad():
        errors = [
            relative_error(fxquant.compile(model, [x], own)(others), model(others))
            for own in (policy, untrained)
        ]
    assert errors[0] < errors[1]


class Rooted(Seeing):
    """Has no value for images with negative pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.sqrt())


def test_pixels_stay_where_the_model_has_a_value() -> None:
    torch.manual_seed(0)
    x = torch.rand(16, 3, 8, 8)
    report = fxquant.compile(seeded(Rooted()), [x], policies.best(3, 3, end_bits=2)).report
    assert report.changes["Reconstruct"] == 1


def test_a_step_without_a_finite_loss_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()

    def spoilt(x: torch.Tensor) -> torch.Tensor:
        return augmented(x) * (float("nan") if next(calls) == 3 else 1.0)

    monkeypatch.setattr(steps, "augmented", spoilt)
    (gain,) = reconstruct(frozen(), **NETWORK, augment=True, held_out=0.25).comparisons
    assert gain.error_ratio < 1
    assert next(calls) == 25


def test_progress_has_the_loss(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxquant.utils.progress.QUIET_SECONDS", -1.0)
    monkeypatch.setattr("fxquant.utils.progress.LINE_SECONDS", -1.0)
    gm = frozen()
    options = Reconstruction(**{**SHORT, **NETWORK, "augment": True, "held_out": 0.0})
    split = split_images(len(BATCH), options)
    run_passes(gm, [Reconstruct(BlockwiseRunner(gm, BATCH, progress=True), options, split)])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("reconstruct, loss x 1.000: 0/25, ")
    found = {float(line.split("loss x ")[1].split(":")[0]) for line in lines}
    assert len(found) > 2
    assert min(found) < 1


def test_images_are_added_for_blocks_and_made_in_each_step_for_networks() -> None:
    text = "set scope to 'network', or augment to False"
    with refused(PolicyError, text, got=Scope.BLOCK, expected=Scope.NETWORK):
        Reconstruction(augment=True)
    with refused(PolicyError, "set augment to True", got=64, expected=0):
        Reconstruction(scope=Scope.NETWORK, images=64)
    with refused(PolicyError, "whole number >= 0", got=-1):
        Reconstruction(images=-1)


@pytest.mark.parametrize(("count", "held_out"), [(40, 0.25), (40, 0.0), (10, 0.25)])
def test_blocks_are_trained_on_added_images_and_not_validated_on_them(
    count: int, held_out: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: set[int] = set()
    validated: list[torch.Tensor] = []
    losses = training.image_losses

    class Watched(training._Run):
        def take(self, images: torch.Tensor) -> None:
            drawn.update(images.tolist())
            super().take(images)

    def watched(block: nn.Module, context: Any, criterion: Any, images: torch.Tensor) -> Any:
        validated.append(images)
        return losses(block, context, criterion, images)

    monkeypatch.setattr(training, "_Run", Watched)
    monkeypatch.setattr(training, "image_losses", watched)
    result = reconstruct(frozen(), images=count, held_out=held_out, block_loss="mse")
    assert result.changed
    split = split_images(len(BATCH), Reconstruction(held_out=held_out))
    assert all(torch.equal(images, split.validation) for images in validated)
    added = range(len(BATCH), max(count, len(BATCH)))
    assert drawn == {*split.training.tolist(), *added}


def test_scales_of_weights_alone_keep_the_codes() -> None:
    gm = frozen()
    before = codes(gm)
    assert reconstruct(gm, **NETWORK, weights="scales", biases=False).changed == 1
    after = codes(gm)
    assert before.keys() == after.keys()
    for name, (old, scale) in before.items():
        new, trained = after[name]
        assert torch.equal(old, new)
        assert not torch.equal(scale, trained)
    text = "set scales to True, or weights to 'none'"
    with refused(PolicyError, text, got=False, expected=True):
        Reconstruction(weights="scales", scales=False)


def codes(gm: torch.fx.GraphModule) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Codes and scale of each weight, by name of its quantizer."""
    found = {}
    for node in gm.graph.nodes:
        if node.op == "call_module" and node.all_input_nodes[0].op == "get_attr":
            quantizer = gm.get_submodule(str(node.target))
            assert isinstance(quantizer, UniformQuantizer)
            weight = get_parameter(gm, node.all_input_nodes[0])
            found[node.name] = quantizer.quantize(weight), quantizer.scale.clone()
    return found


@pytest.mark.parametrize("scope", Scope)
def test_work_bounds_the_steps(scope: Scope) -> None:
    def took(work: float | None) -> int:
        gm, steps = frozen(), []
        options = Reconstruction(**{**SHORT, **NETWORK, "scope": scope, "max_macs": work})

        class Counted(training._Run):
            def take(self, images: torch.Tensor) -> None:
                steps.append(images)
                super().take(images)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "_Run", Counted)
            split = split_images(len(BATCH), options)
            item = Reconstruct(BlockwiseRunner(gm, BATCH), options, split)
            result = run_passes(gm, [item])["Reconstruct"]
        if not steps:
            (skip,) = result.notes
            assert "raise max_macs, or set it to None" in skip.reason
        blocks = 1 if scope is Scope.NETWORK else len(find_blocks(gm))
        assert len(steps) % blocks == 0
        return len(steps) // blocks

    assert took(None) == 25
    some = next(work for work in (2.0**i for i in range(40)) if took(work))
    assert 20 <= took(some) <= 25
    assert took(some / 2) == 0
