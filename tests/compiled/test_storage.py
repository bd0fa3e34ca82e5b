"""Saving and loading: bit for bit, and whole or not at all."""

from __future__ import annotations

import copy
import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import fxquant
from fxquant import Rule, TensorSpec, testing
from fxquant.compiled.storage import CONFIG_FILE, WEIGHTS_FILE
from fxquant.errors import OutputError
from fxquant.graph.edges import edges
from fxquant.testing import DIM, images, seeded, tokens
from tests.helpers import compiled
from tests.helpers.refusals import refused
from tests.helpers.round_trip import assert_round_trip


@pytest.fixture(scope="module")
def small() -> fxquant.CompiledModel:
    return compiled.block()


@pytest.fixture
def saved(small: fxquant.CompiledModel, tmp_path: Path) -> Path:
    small.save(tmp_path / "model")
    return tmp_path / "model"


def test_vit(quantized: fxquant.CompiledModel, tmp_path: Path) -> None:
    assert_round_trip(quantized, images(4, 16), tmp_path)


def test_swin(swin: nn.Module, tmp_path: Path) -> None:
    assert_round_trip(fxquant.compile(swin, [images(2, 32)]), images(2, 32), tmp_path)


@pytest.mark.parametrize("bits", [2, 4, 8, 9, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_width(bits: int, symmetric: bool, tmp_path: Path) -> None:
    spec = TensorSpec(bits=bits, symmetric=symmetric)
    policy = fxquant.Policy(name="p", rules=(Rule(spec=spec),))
    model = fxquant.compile(seeded(testing.TorchAttention()), [tokens()], policy)
    assert_round_trip(model, tokens(), tmp_path)


class Outputs(nn.Module):
    """Tied layers, a dictionary of outputs, and infinite numbers in one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.one(x)
        hidden = y.masked_fill(y < y.mean(-1, keepdim=True), -float("inf"))
        return {"y": self.two(y), "rest": (hidden, [hidden.softmax(-1)])}


def test_tied_weights_and_structured_outputs(tmp_path: Path) -> None:
    assert_round_trip(fxquant.compile(seeded(Outputs()), [tokens()]), tokens(), tmp_path)


def test_one_of_two_tied_layers_stays_float(tmp_path: Path) -> None:
    policy = fxquant.policies.minmax(4, 8).with_rules(Rule(path="two", spec=None))
    model = fxquant.compile(seeded(Outputs()), [tokens()], policy)
    assert_round_trip(model, tokens(), tmp_path)


def test_weights_are_stored_as_integers(saved: Path) -> None:
    tensors = load_file(saved / WEIGHTS_FILE)
    codes = {name for name, tensor in tensors.items() if tensor.dtype == torch.int8}
    assert len(codes) == 6 and all(name.startswith("codes.") for name in codes)


def test_saving_again_replaces(small: fxquant.CompiledModel, saved: Path) -> None:
    (saved / WEIGHTS_FILE).write_bytes(b"old")
    small.save(saved)
    assert torch.equal(fxquant.load(saved)(tokens()), small(tokens()))
    assert sorted(os.listdir(saved)) == sorted([CONFIG_FILE, WEIGHTS_FILE])


# Output that cannot be written


def test_a_folder_that_cannot_be_made(small: fxquant.CompiledModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "model"):
        with refused(OutputError, r"cannot write .*model\.safetensors", got=folder / WEIGHTS_FILE):
            small.save(folder)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_a_folder_in_the_place_of_a_file(small: fxquant.CompiledModel, tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).mkdir()
    with refused(OutputError, r"quant_config\.json is a folder", got=tmp_path / CONFIG_FILE):
        small.save(tmp_path)
    assert os.listdir(tmp_path) == [CONFIG_FILE]


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_safetensors(tensors: Any, path: Path, metadata: Any) -> None:
    path.write_bytes(b"half")
    raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")


@pytest.mark.parametrize(
    ("target", "failure"),
    [
        ("fxquant.compiled.storage.save_file", full_in_safetensors),
        ("fxquant.compiled.storage.save_file", full),
        ("pathlib.Path.write_text", full),
        ("tempfile.mkstemp", full),
        ("os.replace", full),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_what_was_there(
    small: fxquant.CompiledModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    failure: Any,
    existing: bool,
) -> None:
    folder = tmp_path / "deep" / "model"
    if existing:
        folder.mkdir(parents=True)
        (folder / CONFIG_FILE).write_bytes(b"old")
        (folder / WEIGHTS_FILE).write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(target, failure)
        with refused(OutputError, r"No space left.*enough free space") as caught:
            small.save(folder)
        assert caught.value.got in (folder / WEIGHTS_FILE, folder / CONFIG_FILE)
    if existing:
        assert sorted(os.listdir(folder)) == sorted([CONFIG_FILE, WEIGHTS_FILE])
        assert all(file.read_bytes() == b"old" for file in folder.iterdir())
    else:
        assert os.listdir(tmp_path) == []


def test_specs_of_edges_do_not_depend_on_the_report(
    small: fxquant.CompiledModel, tmp_path: Path
) -> None:
    bare = copy.deepcopy(small)
    bare.report = replace(small.report, plan=())
    bare.save(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    wanted = {entry.edge for entry in small.plan if entry.spec is not None}
    assert config["format"] == 5
    assert config["specs"].keys() == wanted
    again = fxquant.load(tmp_path)
    specs = {edge.name: edge.spec for edge in edges(again.graph_module)}
    assert specs == {entry.edge: entry.spec for entry in small.plan}
    assert torch.equal(again(tokens(4)), small(tokens(4)))
