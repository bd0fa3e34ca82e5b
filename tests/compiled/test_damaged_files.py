"""Saved files that are missing, damaged, changed or mixed: each is refused, and named."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import fxquant
from fxquant import testing
from fxquant.compiled.storage import CONFIG_FILE, WEIGHTS_FILE
from fxquant.errors import FileFormatError
from fxquant.testing import seeded, tokens
from tests.helpers import compiled
from tests.helpers.refusals import refused


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    compiled.block().save(tmp_path / "model")
    return tmp_path / "model"


def test_missing_files(saved: Path) -> None:
    text, path = r"cannot read .*No such file.*CompiledModel\.save", saved / "nowhere" / CONFIG_FILE
    with refused(FileFormatError, text, got=path):
        fxquant.load(saved / "nowhere")
    (saved / WEIGHTS_FILE).unlink()
    text = r"cannot read .*model\.safetensors.*missing"
    with refused(FileFormatError, text, got=saved / WEIGHTS_FILE):
        fxquant.load(saved)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_files(saved: Path, name: str, share: float) -> None:
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: int(len(data) * share)])
    with refused(FileFormatError, "truncated", got=saved / name):
        fxquant.load(saved)


@pytest.mark.parametrize(
    ("text", "file_format"),
    [("{}", None), ("[]", None), ('{"format": 99}', 99), ('"model"', None)],
)
def test_foreign_files(saved: Path, text: str, file_format: int | None) -> None:
    (saved / CONFIG_FILE).write_text(text)
    message = rf"quant_config\.json is not of format 5 or 4 \(found {file_format}\)"
    with refused(FileFormatError, message, got=file_format, expected=(4, 5)):
        fxquant.load(saved)


def test_a_config_that_is_not_json(saved: Path) -> None:
    (saved / CONFIG_FILE).write_text("\x00\x01")
    with refused(FileFormatError, r"quant_config\.json is not JSON", got=saved / CONFIG_FILE):
        fxquant.load(saved)


CONFIG_KEYS = (
    "tensors_sha256",
    "graph",
    "quantizers",
    "coded_weights",
    "specs",
    "report",
    "image_shape",
    "policy",
)


@pytest.mark.parametrize("value", ["absent", None, 3, "x", ["x"], {"x": 1}], ids=repr)
@pytest.mark.parametrize("key", CONFIG_KEYS)
def test_a_damaged_part_of_the_config(saved: Path, key: str, value: Any) -> None:
    config = json.loads((saved / CONFIG_FILE).read_text())
    del config[key]
    if value != "absent":
        config[key] = value
    (saved / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(FileFormatError):
        fxquant.load(saved)


def test_an_unknown_operator_is_named(saved: Path) -> None:
    text = (saved / CONFIG_FILE).read_text().replace("aten.gelu.default", "aten.gelo.default")
    (saved / CONFIG_FILE).write_text(text)
    text = r"'aten\.gelo\.default' is unknown to this torch"
    with refused(FileFormatError, text, got="aten.gelo.default"):
        fxquant.load(saved)


def test_a_config_of_brackets_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "quant_config.json").write_text("[" * 100_000)
    with refused(FileFormatError, "is not JSON", got=tmp_path / CONFIG_FILE):
        fxquant.load(tmp_path)


def change(folder: Path, *, settle: bool = True, **changed: Tensor | None) -> None:
    """Rewrites tensors of a save, None takes one out; the digest is made to fit if ``settle``."""
    path = folder / WEIGHTS_FILE
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {**load_file(path), **changed}
    save_file({name: x for name, x in tensors.items() if x is not None}, path, metadata)
    if settle:
        config = json.loads((folder / CONFIG_FILE).read_text())
        config["tensors_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (folder / CONFIG_FILE).write_text(json.dumps(config))


def first(folder: Path, end: str) -> tuple[str, Tensor]:
    """The first tensor whose name contains ``end``."""
    return next(item for item in sorted(load_file(folder / WEIGHTS_FILE).items()) if end in item[0])


@pytest.mark.parametrize(
    ("kind", "damage", "got", "message"),
    [
        (".scale", lambda x: x * 0, None, r"quantizer \S+: its scale is 0\.0, not positive"),
        (".scale", lambda x: -x, None, r"its scale is -\S+, not positive"),
        (".scale", lambda x: x + torch.inf, None, "its scale is inf, not positive"),
        (".scale", lambda x: x + torch.nan, None, r"tensor \S+scale holds NaN"),
        (".zero_point", lambda x: x + 0.5, None, "a zero_point is not a whole number in"),
        (".zero_point", lambda x: x + 1000, None, "a zero_point is not a whole number in"),
        ("bias", lambda x: x + torch.nan, None, r"tensor \S+bias holds NaN"),
        (
            "codes.",
            lambda x: x.to(torch.int16) + 300,
            "reach",
            r"from \d+ to \d+, and 8 bits hold -128",
        ),
        ("codes.", lambda x: x.float(), torch.float32, "are torch.float32, not integers"),
    ],
)
def test_damaged_tensors_are_recognised(
    saved: Path, kind: str, damage: Callable[[Tensor], Tensor], got: object, message: str
) -> None:
    name, tensor = first(saved, kind)
    damaged = damage(tensor)
    change(saved, **{name: damaged})
    got = (int(damaged.min()), int(damaged.max())) if got == "reach" else got
    with refused(FileFormatError, message, got=got) as caught:
        fxquant.load(saved)
    assert str(caught.value.edge) in name


def test_a_scale_of_another_shape_is_recognised(saved: Path) -> None:
    change(saved, **{first(saved, ".scale")[0]: torch.ones(7, 7)})
    with refused(FileFormatError, "do not fit together", got=saved):
        fxquant.load(saved)


def test_a_tensor_too_many_or_too_few_is_recognised(saved: Path) -> None:
    change(saved, stray=torch.ones(3))
    with refused(FileFormatError, "no node of the graph reads tensor stray", edge="stray"):
        fxquant.load(saved)
    change(saved, stray=None)
    fxquant.load(saved)
    change(saved, **{first(saved, "bias")[0]: None})
    with refused(FileFormatError, got=saved):
        fxquant.load(saved)


def test_an_image_shape_that_only_seems_to_fit_is_recognised(saved: Path) -> None:
    config = json.loads((saved / CONFIG_FILE).read_text())
    rows, channels = config["image_shape"]
    (saved / CONFIG_FILE).write_text(json.dumps({**config, "image_shape": [rows + 1, channels]}))
    with pytest.raises(FileFormatError, match=r"is not what .* was saved with|do not fit together"):
        fxquant.load(saved)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"bits": 8', '"bits": 7'),
        ('"bits": 8', '"bits": 99'),
        ("1e-05", "1e-04"),
        ('"observer": "minmax"', '"observer": "mse"'),
    ],
)
def test_a_number_that_was_changed_is_recognised(saved: Path, old: str, new: str) -> None:
    text = (saved / CONFIG_FILE).read_text()
    assert old in text
    (saved / CONFIG_FILE).write_text(text.replace(old, new, 1))
    with pytest.raises(FileFormatError):
        fxquant.load(saved)


def test_a_configuration_may_be_laid_out_anew(saved: Path) -> None:
    config = json.loads((saved / CONFIG_FILE).read_text())
    (saved / CONFIG_FILE).write_text(json.dumps(dict(reversed(config.items()))))
    assert fxquant.load(saved).image_shape == tuple(config["image_shape"])


def test_a_tensor_that_was_changed_is_recognised(saved: Path) -> None:
    name, tensor = first(saved, "bias")
    change(saved, settle=False, **{name: tensor + 1})
    text = "two saves are mixed or one file was changed; use both files of one save"
    expected = json.loads((saved / CONFIG_FILE).read_text())["tensors_sha256"]
    actual = hashlib.sha256((saved / WEIGHTS_FILE).read_bytes()).hexdigest()
    with refused(FileFormatError, text, got=actual, expected=expected):
        fxquant.load(saved)


def test_files_of_two_saves_are_not_mixed(saved: Path, tmp_path: Path) -> None:
    other = fxquant.compile(seeded(testing.Block(), 1), [tokens(4)])
    other.save(tmp_path / "other")
    assert torch.equal(fxquant.load(tmp_path / "other")(tokens()), other(tokens()))
    os.replace(tmp_path / "other" / WEIGHTS_FILE, saved / WEIGHTS_FILE)
    expected = json.loads((saved / CONFIG_FILE).read_text())["tensors_sha256"]
    with refused(FileFormatError, expected=expected):
        fxquant.load(saved)
