"""The search for ranks, and what a curriculum draws in a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.config.recovery import Reconstruction
from fxquant.graph.blocks import find_blocks, whole_network
from fxquant.quantizers import UniformQuantizer
from fxquant.reconstruction import steps, training
from fxquant.reconstruction.blockwise import BlockContext, BlockwiseRunner
from fxquant.reconstruction.image_split import ImageSplit
from fxquant.reconstruction.losses import Criterion, criterion, measure
from fxquant.reconstruction.rank_search import PREFERENCE, RankSearch
from fxquant.reconstruction.trained_block import TrainedBlock
from tests.helpers.towers import BATCH, SHORT, THREE, frozen

COUNT = len(BATCH)
Setup = tuple[TrainedBlock, BlockContext, Criterion, Reconstruction]


def setup(folder: Path, **more: Any) -> Setup:
    options = Reconstruction(**{**SHORT, "block_loss": "mse", **more})
    gm = frozen()
    whole = options.block_loss != "feature"
    sides, blocks = BlockwiseRunner(gm, BATCH), (whole_network(gm),) if whole else find_blocks(gm)
    context = next(iter(sides.walk(gm, blocks, "walk", 1 << 20)))
    measured = measure(sides.teacher(), blocks, BATCH, options, folder)
    loss = criterion(options, measured, context)
    return TrainedBlock(gm, context, options, torch.Generator()), context, loss, options


def low_rank(folder: Path, **more: Any) -> Setup:
    return setup(folder, weights="low_rank", ranks=(1, 3), **{"rank_iterations": 12, **more})


def mean_loss(of: Setup) -> float:
    block, context, loss, _ = of
    return float(training.image_losses(block, context, loss, torch.arange(COUNT)).mean())


@contextmanager
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Numbers of the images of each step."""
    found: list[Tensor] = []
    with monkeypatch.context() as patch:
        for module in (steps, training):

            def add(*args: Any) -> None:
                found.append(args[4])
                real(*args)

            patch.setattr(module, "add_gradients", add)
        yield found


real = steps.add_gradients


def parameters(block: TrainedBlock) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in block.named_parameters()}


def test_factors_and_preferences_are_trained_in_turns_on_two_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = low_rank(tmp_path)
    block, states = of[0], []
    monkeypatch.setattr(block, "settle_ranks", lambda: None)
    take = steps.take_step

    def watched(optimizer: torch.optim.Optimizer) -> None:
        before = parameters(block)
        take(optimizer)
        after = parameters(block)
        states.append({name for name in before if not torch.equal(before[name], after[name])})

    monkeypatch.setattr(steps, "take_step", watched)
    with drawn(monkeypatch) as images:
        steps.search_ranks(*of, mean_loss(of), torch.arange(COUNT))
    assert len(states) == len(images) == 12
    for changed in states[::2]:
        assert changed and not any(name.endswith(PREFERENCE) for name in changed)
    for changed in states[1::2]:
        assert changed and all(name.endswith(PREFERENCE) for name in changed)
    first, second = (set(torch.cat(images[turn::2]).tolist()) for turn in (0, 1))
    assert not first & second and len(first | second) == COUNT


def test_each_parameter_of_a_search_moves_at_its_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step of Adam is the rate, whatever the gradient."""
    of = low_rank(tmp_path, rank_iterations=2, scale_rate=3e-4, weight_rate=1e-2)
    block = of[0]
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name.endswith("outer"):
                parameter.fill_(0.1)  # at zero the other factors and the preferences do not matter
    monkeypatch.setattr(block, "settle_ranks", lambda: None)
    before = parameters(block)
    steps.search_ranks(*of, mean_loss(of), torch.arange(COUNT))
    moved = {
        name: float((p.detach() - before[name]).abs().max()) for name, p in block.named_parameters()
    }
    scales = [m for name, m in moved.items() if name.endswith("log_scale") and m]
    factors = [m for name, m in moved.items() if name.endswith("outer")]
    numbers = [m for name, m in moved.items() if name.endswith(PREFERENCE)]
    assert len(scales) > 4 and len(factors) > 4 and len(numbers) > 2
    assert max(scales) == pytest.approx(3e-4, rel=0.01)
    assert max(factors) == pytest.approx(1e-2, rel=0.01)
    assert max(numbers) == pytest.approx(1e-1, rel=0.01)


def test_a_search_that_meets_no_finite_gradient_leaves_all_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, context, loss, options = low_rank(tmp_path)
    monkeypatch.setattr(block, "settle_ranks", lambda: None)
    before = parameters(block)
    broken = lambda *args: loss(*args) * torch.inf  # noqa: E731
    steps.search_ranks(block, context, broken, options, 1.0, torch.arange(COUNT))
    assert all(torch.equal(p, before[name]) for name, p in block.named_parameters())


def test_what_a_search_leaves_is_nearer_than_where_it_began(tmp_path: Path) -> None:
    of = low_rank(tmp_path, rank_iterations=60)
    before = mean_loss(of)
    steps.search_ranks(*of, before, torch.arange(COUNT))
    assert not of[0].searches_ranks
    assert mean_loss(of) < before


@pytest.mark.parametrize("rank", [None, 1, 3])
def test_the_candidate_that_stays_keeps_its_share(rank: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, generator=generator)
    start = UniformQuantizer.from_range(weight.amin(1), weight.amax(1), THREE, 0)
    form = RankSearch(weight, start, scales=True, ranks=(1, 3), generator=generator).eval()
    with torch.no_grad():
        form.preference.copy_(torch.tensor([0.3, -0.5]))
        for candidate in form.candidates:
            candidate.outer.normal_(generator=generator)
        form.candidates[1 if rank != 3 else 0].outer.zero_()  # the other one adds nothing
        form.log_scale.fill_(0.1)
    settled = form.settled(rank).eval()
    assert settled.rank == (rank or 1)
    assert torch.allclose(settled(), form(), atol=1e-6)
    assert not torch.equal(settled(), start(weight))


def test_candidates_are_left_out_of_steps_at_random_and_count_the_same_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, generator=generator)
    start = UniformQuantizer.from_range(weight.amin(1), weight.amax(1), THREE, 0)
    form = RankSearch(weight, start, scales=False, ranks=(1, 3), generator=generator)
    with torch.no_grad():
        for candidate in form.candidates:
            candidate.outer.normal_(generator=generator)
        torch.manual_seed(0)
        drawn = torch.stack([form.train()._steps() for _ in range(4000)])
        settled = form.eval()._steps()
    assert len({float(value) for value in drawn[:, 0, 0]}) == 4  # both, either, none
    torch.testing.assert_close(drawn.mean(0), settled, rtol=0.05, atol=0.05)


def test_two_images_decide_on_ranks_as_well(tmp_path: Path) -> None:
    of = low_rank(tmp_path, rank_iterations=6)
    block = of[0]
    found = []
    settle = block.settle_ranks
    block.settle_ranks = lambda: found.extend(  # type: ignore[method-assign]
        p.detach().clone() for name, p in block.named_parameters() if name.endswith(PREFERENCE)
    )
    steps.search_ranks(*of, mean_loss(of), torch.arange(1))
    settle()
    assert len(found) > 2 and all(bool(value.any()) for value in found)


def test_the_features_loss_counts_the_block_twice(tmp_path: Path) -> None:
    block, context, loss, _ = setup(tmp_path, block_loss="feature")
    everyone = torch.arange(COUNT)
    given, target = (
        store.get(everyone, context.device)
        for store in (context.quantized_inputs, context.float_outputs)
    )
    with torch.no_grad():
        found = block.eval()(given)
        first = loss(found, target, everyone)  # each part of it a mean of one
        exact = loss(target, target, everyone)
        halfway = {name: (found[name] + value) / 2 for name, value in target.items()}
    assert float(first.mean()) == pytest.approx(3, rel=1e-4)
    assert float(exact.max()) < 1e-6
    near = loss._block(found, target, everyone) / loss._sizes[0]  # type: ignore[attr-defined]
    far = first - 2 * near
    assert float(near.mean()) == pytest.approx(1, rel=1e-4)
    assert float(far.mean()) == pytest.approx(1, rel=1e-4)
    assert float(loss(halfway, target, everyone).mean()) < 1


def test_a_curriculum_begins_with_the_images_of_the_least_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, context, loss, options = setup(tmp_path, curriculum=0.25, iterations=16)
    everyone = torch.arange(COUNT)
    easy = training.image_losses(block, context, loss, everyone).argsort()[: COUNT // 4]
    with drawn(monkeypatch) as images:
        split = ImageSplit(everyone, everyone)
        training.train_block(block, context, loss, options, split)
    assert len(images) == 16
    assert set(images[0].tolist()) == set(easy.tolist())
    assert len(torch.cat(images[8:]).unique()) > COUNT // 2
