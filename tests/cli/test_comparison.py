"""``fxquant eval`` of outputs that are not classes: compared with the float model's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import policies
from fxquant.cli import commands, main
from fxquant.cli.comparison import compare, kinds_of
from fxquant.cli.evaluation import Runtime, torch_runtime
from fxquant.cli.preprocess import plain_preprocessing
from fxquant.compiled.output_errors import OutputKind
from fxquant.compiled.storage import output_kinds
from fxquant.errors import ModelError
from fxquant.testing import seeded
from tests.helpers.cli_helpers import ARGS, TINY, VIT, draw, fails

NO_CLASSES = ["--model-arg", *(f"{k}={v}" for k, v in {**TINY, "num_classes": 0}.items())]
BY_NAME = ["--reference", VIT, "--random-weights"]


@pytest.fixture(scope="module")
def flat_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flat")
    for i in range(6):
        draw(folder / f"{i}.png", i)
    return folder


@pytest.fixture(scope="module")
def embedder(flat_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT without classes, compiled by the command line."""
    out = tmp_path_factory.mktemp("embedder")
    start = ["compile", VIT, *NO_CLASSES, "--random-weights", "--data", str(flat_images)]
    policy = ["--policy", "ptq4vit"]
    assert main([*start, *policy, "--images", "6", "--out", str(out)]) == 0
    return out


class Saliency(nn.Module):
    """A map of one channel in 0..1."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu()).sigmoid()


@pytest.fixture(scope="module")
def mapper(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A map compiled to 8 bits, with all files, and to 16 bits, for the simulation alone."""
    out, model = tmp_path_factory.mktemp("mapper"), seeded(Saliency())
    data = [torch.rand(4, 3, 32, 32)]
    eight, sixteen = (fxquant.compile(model, data, policies.minmax(n, n)) for n in (8, 16))
    preprocessing = plain_preprocessing("saliency", 32, (0.5,) * 3, (0.25,) * 3)
    commands.write_artifacts(eight, preprocessing, out / "eight")
    sixteen.save(out / "sixteen")
    return out / "eight", out / "sixteen"


def figures(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def test_a_map_is_compared_and_has_no_accuracy(
    mapper: tuple[Path, Path], photos: Path, flat_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eight, sixteen = mapper
    for data in (photos, flat_images):
        error = fails(capsys, "eval", eight, "--data", data)
        assert "maps or tokens, which have no accuracy: give --reference" in error
    options = ["--data", str(photos), "--reference", str(sixteen)]
    assert main(["eval", str(eight), *options]) == 0
    printed = capsys.readouterr().out
    assert "model.onnx in onnxruntime against torch simulation: 14 images" in printed
    assert "output, dense (1, 32, 32): MAE" in printed and "areas above one half" in printed
    assert "top-1" not in printed
    values = figures(capsys, eight, *options)
    (output,) = values["outputs"]
    assert "top1" not in values and output["agreement"] is None
    assert 0 < output["mae"] < 0.02 and output["cosine"] > 0.999 and output["sqnr"] > 30
    assert output["overlap"] > 0.9 and output["largest"] < 0.1


def test_an_embedding_is_told_by_the_compiled_model(
    embedder: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert output_kinds(embedder) == (OutputKind.EMBEDDING,)
    error = fails(capsys, "eval", embedder, "--data", photos)
    assert "embeddings, which have no accuracy: give --reference" in error
    values = figures(capsys, embedder, "--data", photos, *BY_NAME, *NO_CLASSES)
    (output,) = values["outputs"]
    assert values["reference"] == "vit_tiny_patch16_224 in float32" and values["images"] == 14
    assert output["kind"] == "embedding" and output["shape"] == [32]
    assert output["cosine"] > 0.99 and 0.5 < output["agreement"] <= 1
    assert "top1" not in values


def test_the_user_may_tell_features_of_a_bare_file(
    embedder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("model.onnx", "preprocessing.json"):
        shutil.copy(embedder / name, tmp_path)
    path = tmp_path / "model.onnx"
    options = ["--data", str(photos), *BY_NAME, *NO_CLASSES]
    assert figures(capsys, path, *options)["outputs"][0]["kind"] == "logits"
    values = figures(capsys, path, *options, "--outputs", "features")
    assert values["outputs"][0]["kind"] == "embedding" and "top1" not in values
    assert "top1" in figures(capsys, embedder, *options[:2], "--outputs", "logits")


def test_compile_says_which_loss_it_took(
    flat_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["compile", VIT, "--random-weights", "--data", str(flat_images), "--images", "4"]
    policy = ["--policy", "ptq4vit", "--out", str(tmp_path / "out")]
    assert main([*start, *NO_CLASSES, *policy]) == 0
    printed = capsys.readouterr().out
    assert "output 0: it counts as an embedding (B, 32), since it is read from" in printed
    assert "output, embedding (32,): MAE" in printed
    assert main([*start, *ARGS, *policy]) == 0
    printed = capsys.readouterr().out
    assert "embedding" not in printed and "MAE" not in printed


def test_a_classifier_has_its_agreement_too(
    flat_images: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["compile", VIT, *ARGS, "--random-weights", "--data", str(flat_images)]
    assert main([*start, "--images", "6", "--out", str(tmp_path), "--policy", "w8a8"]) == 0
    values = figures(capsys, tmp_path, "--data", photos, *BY_NAME, *ARGS)
    assert values["outputs"][0]["agreement"] > 0.7 and 0 <= values["top1"] <= 1
    values = figures(capsys, tmp_path, "--data", flat_images, *BY_NAME, *ARGS)
    assert "top1" not in values and values["images"] == 6
    error = fails(capsys, "eval", tmp_path, "--data", photos, *BY_NAME, *NO_CLASSES)
    assert "of shapes [(8, 7)]" in error and "[(8, 32)]" in error and "--model-arg" in error


def test_references_that_cannot_be(
    mapper: tuple[Path, Path], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["eval", str(mapper[0]), "--data", str(photos), "--reference"]
    assert "none.onnx does not exist" in fails(capsys, *start, "none.onnx")
    assert "no model 'vit_tiny_patch16_22'" in fails(capsys, *start, "vit_tiny_patch16_22")
    assert "has no weights yet" in fails(capsys, *start, VIT)


class Several(nn.Module):
    """Logits, a map, and whole numbers."""

    def forward(self, x: Tensor) -> Any:
        return {"logits": x.mean((2, 3)), "map": x[:, :1], "best": x.mean((2, 3)).argmax(1)}


class Moved(Several):
    """The same, with another map."""

    def forward(self, x: Tensor) -> Any:
        outputs = super().forward(x)
        return {**outputs, "map": outputs["map"] + 0.5}


def test_every_float_output_is_compared() -> None:
    runtime, reference = torch_runtime("moved", Moved()), torch_runtime("float", Several())
    data = [(torch.rand(4, 3, 8, 8), torch.zeros(4)) for _ in range(2)]
    kinds = kinds_of(runtime.run(data[0][0]), "auto", ())
    assert kinds == (OutputKind.LOGITS, OutputKind.DENSE)
    logits, dense = compare(runtime, reference, data, kinds).outputs
    assert (logits.name, logits.mae, logits.agreement) == ("output 0", 0, 1)
    assert (dense.name, dense.mae) == ("output 1", pytest.approx(0.5))


def test_recorded_kinds_of_other_outputs_are_not_used() -> None:
    outputs = (torch.ones(2, 4),)
    assert kinds_of(outputs, "auto", [OutputKind.EMBEDDING]) == (OutputKind.EMBEDDING,)
    assert kinds_of(outputs, "auto", [OutputKind.EMBEDDING] * 2) == (OutputKind.LOGITS,)
    assert kinds_of(outputs, "logits", [OutputKind.EMBEDDING]) == (OutputKind.LOGITS,)


def test_outputs_that_are_no_floats_cannot_be_compared() -> None:
    runtime = Runtime(name="x", run=lambda images: (images.argmax(1),))
    with pytest.raises(ModelError, match="x has no float output"):
        compare(runtime, runtime, [(torch.rand(2, 3, 4, 4), torch.zeros(2))], ())
