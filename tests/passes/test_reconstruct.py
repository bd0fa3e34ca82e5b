"""Reconstruction: what is trained, by which loss, and that a run can be interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fxquant
from fxquant import policies
from fxquant.config.recovery import Compensation, Reconstruction
from fxquant.errors import PolicyError
from fxquant.graph.blocks import whole_network
from fxquant.passes import Compensate, Reconstruct
from fxquant.policies.policy import Policy
from fxquant.policies.policy_file import policy_from_dict, policy_to_dict
from fxquant.reconstruction import steps, training
from fxquant.reconstruction.blockwise import BlockwiseRunner
from fxquant.reconstruction.image_split import split_images
from fxquant.reconstruction.losses import criterion, measure
from fxquant.reconstruction.trained_block import TrainedBlock
from fxquant.reconstruction.training import train_block
from fxquant.testing import relative_error, seeded
from tests.helpers.refusals import refused
from tests.helpers.towers import BATCH, SHORT, Stack, Tower, frozen, reconstruct


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_loss": "mse"},
        {"block_loss": "feature"},
        {"weights": "adaround", "weight_rate": 0.1, "iterations": 60},
        {"weights": "low_rank", "ranks": (3,)},
        {"weights": "low_rank", "ranks": (1, 2, 90), "rank_iterations": 20},
        {"weights": "none"},
        {"scales": False, "biases": False},
        {"drop": 0.5},
        {"curriculum": 0.5},
        {"bf16": True},
        {"held_out": 0.0},
    ],
    ids=str,
)
def test_blocks_come_nearer_to_the_float_ones(options: dict[str, Any]) -> None:
    gm = frozen()
    with torch.no_grad():
        exact = seeded(Tower())(BATCH)
        before = (gm(BATCH) - exact).square().mean()
    result = reconstruct(gm, **options)
    assert result.changed + len(result.notes) == 4
    assert result.changed >= 2
    assert all(
        gain.error_ratio < 1 for gain in result.comparisons if not gain.choice.startswith("rank")
    )
    ranks = {gain.choice for gain in result.comparisons if gain.choice.startswith("rank")}
    assert ranks <= {f"rank {rank}" for rank in (1, 2, 3, 4)}
    assert bool(ranks) == (options.get("weights") == "low_rank")
    with torch.no_grad():
        assert (gm(BATCH) - exact).square().mean() < before


@pytest.mark.parametrize("block_loss", ["mse", "fisher", "feature"])
def test_a_network_is_trained_as_one(block_loss: str) -> None:
    gm = frozen()
    with torch.no_grad():
        exact = seeded(Tower())(BATCH)
        before = (gm(BATCH) - exact).square().mean()
    result = reconstruct(gm, scope="network", block_loss=block_loss)
    assert [gain.site for gain in result.comparisons] == ["network"]
    with torch.no_grad():
        assert (gm(BATCH) - exact).square().mean() < before


def test_images_held_out_decide() -> None:
    gm = frozen()
    x = BATCH[split_images(len(BATCH), Reconstruction(held_out=0.5)).validation]
    with torch.no_grad():
        exact = seeded(Tower())(x)
        before = (gm(x) - exact).square().mean()
        (gain,) = reconstruct(
            gm, scope="network", block_loss="mse", held_out=0.5, batch=6
        ).comparisons
        assert gain.error_ratio == pytest.approx(
            float((gm(x) - exact).square().mean() / before), 1e-3
        )


@given(st.integers(1, 300), st.floats(0, 0.5))
def test_images_held_out_are_not_trained_on(count: int, share: float) -> None:
    split = split_images(count, Reconstruction(held_out=share, seed=count))
    validation, training = split.validation, split.training
    assert torch.equal(torch.cat((validation, training)).unique(), torch.arange(count))
    assert split.holds_out == bool(share and count > 1)
    if split.holds_out:
        assert len(validation) == max(1, round(share * count))
        assert len(training) == count - len(validation) > 0
    else:
        assert torch.equal(validation, training)


def test_without_a_reconstruction_no_image_is_held_out() -> None:
    assert torch.equal(split_images(5, None).training, torch.arange(5))


class Classes(Tower):
    """Gives class numbers as well, or nothing else."""

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.alone = alone

    def forward(self, x: Tensor) -> Any:
        found = super().forward(x)
        return found.argmax(-1) if self.alone else (found.argmax(-1), found)


@pytest.mark.parametrize("block_loss", ["mse", "fisher"])
def test_class_numbers_are_no_part_of_the_loss(block_loss: str) -> None:
    plain, both = frozen(), frozen(Classes(alone=False))
    expected, found = (reconstruct(g, block_loss=block_loss, iterations=6) for g in (plain, both))
    assert found.comparisons == expected.comparisons and found.comparisons
    assert torch.equal(both(BATCH)[1], plain(BATCH))


def test_a_last_block_without_float_outputs_is_left() -> None:
    result = reconstruct(frozen(Classes(alone=True)), block_loss="mse", iterations=6)
    assert result.changed
    assert result.notes[-1].site == "head"


def test_the_second_run_changes_nothing() -> None:
    gm = frozen()
    reconstruct(gm)
    found = gm(BATCH)
    assert reconstruct(gm).changed == 0
    assert torch.equal(gm(BATCH), found)


def test_what_is_not_named_stays() -> None:
    gm = frozen()
    weights = {k: v.clone() for k, v in gm.state_dict().items() if k.endswith("weight")}
    scales = {k: v.clone() for k, v in gm.state_dict().items() if k.endswith("scale")}
    reconstruct(gm, weights="none", biases=False)
    state = gm.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    assert not all(torch.equal(state[name], value) for name, value in scales.items())


def test_the_best_state_is_kept_where_later_ones_are_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gm = frozen()
    sides, blocks = BlockwiseRunner(gm, BATCH), (whole_network(gm),)
    context = next(iter(sides.walk(gm, blocks, "walk", 1 << 20)))
    options = Reconstruction(**SHORT)
    block = TrainedBlock(gm, context, options, torch.Generator())
    losses = iter([8.0, 6.0, 5.0, 7.0, 9.0, float("nan"), 5.0, 6.0, 7.0])
    seen: list[dict[str, Tensor]] = []

    def looked(block: TrainedBlock, *_: Any) -> Tensor:
        seen.append(dict(block.changes().weights))
        return torch.tensor([next(losses, 8.0)])

    monkeypatch.setattr(training, "image_losses", looked)
    measured = measure(sides.teacher(), blocks, BATCH, options, tmp_path)
    split = split_images(24, replace(options, held_out=0.2))
    loss = criterion(options, measured, context)
    result = train_block(block, context, loss, options, split)
    assert (result.loss_before, result.loss_after) == (8.0, 5.0)
    assert result.changes is not None
    for name, weight in result.changes.weights.items():
        assert torch.equal(weight, seen[2][name])
        assert not torch.equal(weight, seen[-1][name])


def test_a_step_in_parts_is_the_same_step() -> None:
    def after(parts: int) -> tuple[Tensor, int]:
        """The gradient of a step, so many images at once, and the number of calls of the block."""
        gm = frozen()
        sides, blocks = BlockwiseRunner(gm, BATCH), (whole_network(gm),)
        context = next(iter(sides.walk(gm, blocks, "walk", 1 << 20)))
        options = Reconstruction(**SHORT)
        block, calls = TrainedBlock(gm, context, options, torch.Generator()), []
        options = replace(options, memory_bytes=parts * block.bytes_per_image)
        block.register_forward_hook(lambda *_: calls.append(1))
        measured = measure(sides.teacher(), blocks, BATCH, options, Path())
        run = training._Run(block, context, criterion(options, measured, context), options, 24, 1e3)
        run.take(torch.arange(12))
        grads = [p.grad.flatten() for p in block.parameters() if p.grad is not None]
        return torch.cat(grads), len(calls)

    (whole, once), (parts, many) = after(12), after(5)
    assert (once, many) == (1, 3)
    assert 0 < float(whole.norm()) < steps._MAX_GRADIENT_NORM
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


def test_parameters_are_in_the_order_of_the_graph() -> None:
    """Sums over them would else differ from run to run."""
    gm = frozen()
    walk = BlockwiseRunner(gm, BATCH).walk(gm, (whole_network(gm),), "walk", 1 << 20)
    (context,) = walk
    block = TrainedBlock(gm, context, Reconstruction(), torch.Generator())
    biases = list(block.changes().biases)
    assert len(biases) > 4
    assert biases == [node.name for node in gm.graph.nodes if node.name in biases]


def policy() -> Policy:
    return replace(
        policies.ptq4vit(3, 6),
        compensation=Compensation(),
        reconstruction=Reconstruction(
            iterations=20, weight_rate=2e-2, weights="low_rank", ranks=(1, 3), rank_iterations=6
        ),
    )


def test_a_policy_reconstructs_and_leaves_by_every_way(tmp_path: Path) -> None:
    model = seeded(Stack())
    compiled = fxquant.compile(model, [BATCH], policy(), cache=tmp_path / "cache")
    plain = fxquant.compile(
        model, [BATCH], replace(policy(), compensation=None, reconstruction=None)
    )
    exact = model(BATCH)
    errors = [(found(BATCH) - exact).square().mean() for found in (compiled, plain)]
    assert errors[0] < errors[1]
    assert {"Compensate", "Reconstruct"} <= {item.step for item in compiled.report.comparisons}
    assert "reconstruct" in compiled.report.seconds
    compiled.export_onnx(tmp_path / "model.onnx")  # which checks onnxruntime against it
    assert relative_error(compiled.lower("integer")(BATCH), compiled(BATCH)) < 1e-4
    compiled.save(tmp_path / "saved")
    assert torch.equal(fxquant.load(tmp_path / "saved")(BATCH), compiled(BATCH))
    again = fxquant.compile(model, [BATCH], policy(), cache=tmp_path / "cache")
    assert torch.equal(again(BATCH), compiled(BATCH))


def test_files_hold_it() -> None:
    assert policy_from_dict(policy_to_dict(policy())) == policy()
    assert Compensate.requires is Reconstruct.requires


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(PolicyError, match="trains nothing"):
        Reconstruction(weights="none", scales=False, biases=False)
    text = r"^drop must be a number in \[0, 0.95\], got 1"
    with refused(PolicyError, text, got=1, expected="a number in [0, 0.95]"):
        Reconstruction(drop=1)
    for share in (1.0, -0.5, float("nan"), "half"):
        with refused(PolicyError, got=share, expected="a number in [0, 0.5]"):
            Reconstruction(held_out=share)
    text = "^iterations must be a whole number >= 1, got 0"
    with refused(PolicyError, text, got=0, expected="a whole number >= 1"):
        Reconstruction(iterations=0)


def test_aiqvit_has_its_parts_and_leaves_by_every_way(tmp_path: Path) -> None:
    short = Reconstruction(**SHORT, rank_iterations=10)
    item = policies.aiqvit(4, 4, reconstruction=short)
    compiled = fxquant.compile(seeded(Stack()), [BATCH], item)
    schemes = {entry.fed_by: entry.spec.scheme for entry in compiled.plan if entry.spec}
    assert schemes["softmax"] == "dynamic_focusing"
    assert {item.step for item in compiled.report.comparisons} == {"Reconstruct"}
    compiled.export_onnx(tmp_path / "model.onnx")  # which checks onnxruntime against it
    assert relative_error(compiled.lower("integer")(BATCH), compiled(BATCH)) < 1e-4
    assert policy_from_dict(policy_to_dict(item)) == item
    bare = policies.aiqvit(4, 4, low_rank=False, focusing=False, curriculum=False)
    assert bare.reconstruction == Reconstruction(
        weights="none", block_loss="mse", drop=0.0, ranks=(10, 20, 50, 100, 150)
    )
