"""Reconstruction that is interrupted, and goes on with the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fxquant
from fxquant import policies, testing
from fxquant.errors import FileFormatError, OutputError
from fxquant.passes import reconstruct as reconstruct_pass
from fxquant.reconstruction import training
from fxquant.reconstruction.checkpoint import Checkpoints
from tests.helpers.refusals import refused
from tests.helpers.towers import BATCH, frozen, reconstruct


def test_an_interrupted_run_ends_with_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = frozen()
    reconstruct(whole, drop=0.5)
    real, calls = reconstruct_pass.train_block, []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(reconstruct_pass, "train_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(frozen(), tmp_path, drop=0.5)
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in folder.iterdir()] == ["block-0.safetensors"]
    monkeypatch.setattr(reconstruct_pass, "train_block", real)
    again = frozen()
    result = reconstruct(again, tmp_path, drop=0.5)
    assert result.changed + len(result.notes) == 4
    assert torch.equal(again(BATCH), whole(BATCH))
    resumed = frozen()
    reconstruct(resumed, tmp_path, drop=0.5)
    assert torch.equal(resumed(BATCH), whole(BATCH))


@pytest.mark.parametrize(
    "options",
    [
        {"scope": "network", "weights": "low_rank", "ranks": (1, 3), "rank_iterations": 4},
        {"scope": "network", "drop": 0.5},
        {"scope": "network", "augment": True, "held_out": 0.0, "weights": "scales"},
        {"curriculum": 0.4, "weights": "adaround"},
        {"weights": "none"},
    ],
    ids=lambda options: ", ".join(map(str, options.values())),
)
def test_a_block_goes_on_from_its_last_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    whole = frozen()
    reconstruct(whole, **options)
    real, looks, steps = training._Run.record_validation, [], []

    def interrupted(run: training._Run, loss: float) -> None:
        real(run, loss)
        looks.append(loss)
        if len(looks) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(training._Run, "record_validation", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(frozen(), tmp_path, **options)
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in folder.iterdir()] == ["block-0.training"]
    monkeypatch.setattr(training._Run, "record_validation", real)
    take = training._Run.take
    monkeypatch.setattr(
        training._Run, "take", lambda run, images: (steps.append(run.step), take(run, images))
    )
    monkeypatch.setattr(training, "search_ranks", pytest.fail)
    again = frozen()
    left = folder / "block-0.training"
    data = left.read_bytes()
    reconstruct(again, tmp_path, **options)
    assert steps[0] == 5 * 4  # of 25 steps, one in four is looked at
    assert torch.equal(again(BATCH), whole(BATCH))
    assert not list(tmp_path.rglob("*.training"))
    left.write_bytes(data)  # a run that ended between its last two steps leaves it
    reconstruct(frozen(), tmp_path, **options)
    assert not left.exists()


def test_a_damaged_state_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Checkpoints.put
    monkeypatch.setattr(Checkpoints, "put", lambda *_: None)
    reconstruct(frozen(), tmp_path)
    monkeypatch.setattr(Checkpoints, "put", put)
    path = next(tmp_path.rglob("block-0.training"))
    data = path.read_bytes()
    for damaged in (data[:100], data[:-9] + b"x" + data[-8:], b""):
        path.write_bytes(damaged)
        text = None if damaged else r"block-0\.training is damaged.*delete it"
        with refused(FileFormatError, text, got=path):
            reconstruct(frozen(), tmp_path)


def test_blocks_of_other_options_are_not_taken(tmp_path: Path) -> None:
    reconstruct(frozen(), tmp_path)
    reconstruct(frozen(), tmp_path, seed=1)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_other_threads_trained_is_not_taken(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    reconstruct(frozen(), tmp_path, iterations=2)
    try:
        torch.set_num_threads(threads + 1)
        reconstruct(frozen(), tmp_path, iterations=2)
    finally:
        torch.set_num_threads(threads)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_file_says_what_to_do(tmp_path: Path) -> None:
    reconstruct(frozen(), tmp_path)
    path = next(tmp_path.rglob("block-1.safetensors"))
    path.write_bytes(path.read_bytes()[:100])
    with refused(FileFormatError, r"block-1\.safetensors is damaged \(.*delete it", got=path):
        reconstruct(frozen(), tmp_path)
    path.write_bytes(path.with_stem("block-0").read_bytes())
    with refused(FileFormatError, r"\(its checksum is another\)", got=path):
        reconstruct(frozen(), tmp_path)
    path = next(tmp_path.rglob("block-0.safetensors"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with refused(FileFormatError, r"\(its checksum is another\)", got=path):
        reconstruct(frozen(), tmp_path)


def test_a_cache_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(*_: Any) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr("fxquant.passes.pipeline.capture", capture)
    (tmp_path / "file").write_text("")
    text = "file is a file; choose another folder"
    with refused(OutputError, text, got=tmp_path / "file"):
        fxquant.compile(
            testing.seeded(testing.Block()),
            [testing.tokens()],
            policies.aiqvit(4, 4),
            cache=tmp_path / "file",
        )
