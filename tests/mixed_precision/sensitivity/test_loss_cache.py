"""The file of measured losses, and the fingerprint that it goes by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxquant.config.spec import TensorSpec
from fxquant.errors import FileFormatError, OutputError
from fxquant.graph.fingerprint import fingerprint
from fxquant.mixed_precision.sensitivity.loss_cache import LossCache
from fxquant.policies.policy import Rule
from fxquant.testing import tokens
from tests.helpers.refusals import refused
from tests.helpers.sensitive import RULES, Classifier, Setup


def lines(folder: Path) -> tuple[Path, list[str]]:
    (path,) = folder.iterdir()
    return path, path.read_text().splitlines()


def test_losses_come_back_bit_for_bit(tmp_path: Path) -> None:
    losses = {("a", (4,)): 0.1 + 0.2, ("a", (5,)): 5e-324, ("all groups", (4, 8)): 1 / 3}
    cache = LossCache(tmp_path / "new", "f" * 64, {"policy": "p"})
    for key, loss in losses.items():
        assert key not in cache
        cache.put(key, loss)
    cache.close()
    again = LossCache(tmp_path / "new", "f" * 64, {"policy": "p"})
    assert {key: again[key] for key in losses} == losses
    again.close()
    _, text = lines(tmp_path / "new")
    assert len(text) == 4 and '"policy": "p"' in text[0]


@pytest.mark.parametrize("torn", ['{"what": "a", "bits": [5], "lo', '{"what": "a"', "\x00", "{}"])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: str) -> None:
    cache = LossCache(tmp_path, "f" * 64, {})
    cache.put(("a", (4,)), 0.5)
    cache.close()
    path, whole = lines(tmp_path)
    path.write_text("\n".join([*whole, torn]))
    cache = LossCache(tmp_path, "f" * 64, {})
    assert ("a", (5,)) not in cache and cache["a", (4,)] == 0.5
    cache.put(("a", (5,)), 0.25)
    cache.close()
    assert lines(tmp_path)[1][:2] == whole and len(lines(tmp_path)[1]) == 3


def test_a_damaged_line_or_another_fingerprint_raises(tmp_path: Path) -> None:
    cache = LossCache(tmp_path, "f" * 64, {})
    cache.put(("a", (4,)), 0.5)
    cache.close()
    path, whole = lines(tmp_path)
    for line in ("nonsense", "\udcff", whole[1].replace("0.5", "NaN"), "[" * 100_000):
        data = f"{whole[0]}\n{line}\n{whole[1]}\n".encode(errors="surrogateescape")
        path.write_bytes(data)
        with refused(FileFormatError, "line 2 is damaged", got=path):
            LossCache(tmp_path, "f" * 64, {})
    path.write_text(f"{whole[0]}\nnonsense\n{whole[1]}\n")
    with refused(FileFormatError, r"line 2 is damaged .*delete the file", got=path):
        LossCache(tmp_path, "f" * 64, {})
    path.write_text("\n".join(whole) + "\n")
    with refused(FileFormatError, "is not the one in its name", got=path):
        LossCache(tmp_path, "f" * 16 + "e" * 48, {})


def test_two_runs_at_once_keep_what_both_measured(tmp_path: Path) -> None:
    one, two = LossCache(tmp_path, "f" * 64, {}), LossCache(tmp_path, "f" * 64, {})
    for cache, bits in ((one, 4), (two, 5), (one, 6), (two, 4)):
        cache.put(("a", (bits,)), bits / 10)
    one.close()
    two.close()
    path, whole = lines(tmp_path)
    path.write_text("\n".join([whole[0], *whole]) + "\n")  # made by both
    again = LossCache(tmp_path, "f" * 64, {})
    assert [again["a", (bits,)] for bits in (4, 5, 6)] == [0.4, 0.5, 0.6]
    again.close()


def test_another_fingerprint_is_another_file(tmp_path: Path) -> None:
    for name in ("a" * 64, "b" * 64):
        cache = LossCache(tmp_path, name, {})
        assert ("x", (4,)) not in cache
        cache.put(("x", (4,)), 1.0)
        cache.close()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with refused(OutputError, "Choose a writable folder") as caught:
        LossCache(tmp_path / "file", "f" * 64, {})
    assert caught.value.got.parent == tmp_path / "file"


def test_the_fingerprint_follows_everything_a_loss_depends_on() -> None:
    def made(model: nn.Module, x: Tensor, rules: tuple[Rule, ...] = RULES) -> Setup:
        return Setup(model, x, rules)

    base = made(Classifier(), tokens(8))
    same = made(Classifier(), tokens(8))
    key = fingerprint(base.gm, base.x, 0)
    assert fingerprint(same.gm, same.x, 0) == key
    weights = made(Classifier(), tokens(8))
    with torch.no_grad():
        weights.gm.get_parameter("head.bias")[0] += 1e-6
    statistics = made(Classifier(), tokens(16))
    symmetric = made(Classifier(), tokens(8), (*RULES[:3], Rule(spec=TensorSpec(symmetric=True))))
    pinned = made(Classifier(), tokens(8), (replace(RULES[0], pinned=True), *RULES[1:]))
    others = {
        fingerprint(pinned.gm, base.x, 0),
        fingerprint(weights.gm, weights.x, 0),
        fingerprint(statistics.gm, base.x, 0),
        fingerprint(symmetric.gm, base.x, 0),
        fingerprint(base.gm, base.x[:4], 0),
        fingerprint(base.gm, base.x, 1),
    }
    assert len(others) == 6 and key not in others
