"""``fxquant compile``: what it takes, and what it says of what it cannot take."""

from __future__ import annotations

import socket
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import fxquant
from fxquant.cli import commands, main
from fxquant.cli.preprocess import timm_preprocessing, torchvision_preprocessing
from fxquant.errors import DataError, LoweringError
from tests.helpers.cli_helpers import ARGS, TINY, VIT, draw, fails


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(3)
    return timm.create_model("vit_tiny_patch16_224", **TINY).eval()


@pytest.fixture(scope="module")
def checkpoint(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "vit.safetensors"
    save_file(model.state_dict(), path)
    return path


# compile


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilation without writing, where the files are not what is tested."""

    def nothing(compiled: fxquant.CompiledModel, *_: object) -> str:
        return f"nothing written for {compiled.image_shape}"

    monkeypatch.setattr(commands, "write_artifacts", nothing)


@pytest.mark.usefixtures("no_export")
def test_compile_prints_the_summary_and_what_stayed_float(
    flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "mine.yaml"
    rules = [{"fed_by": "softmax", "spec": None}, {"spec": {"bits": 8}}]
    policy.write_text(yaml.safe_dump({"name": "mine", "rules": rules}))
    arguments = ["compile", "vit_tiny_patch16_224", *ARGS, "--random-weights", "--policy"]
    assert main([*arguments, str(policy), "--data", str(flat), "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    printed = captured.out
    assert "mine: " in printed
    assert "3 calibration images" in printed
    assert "has 3 images, 32 were asked for" in captured.err
    assert "stayed float: blocks_0_attn" in printed


@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize(("held_out", "count"), [(0.3, 1024), (0.0, 32)])
def test_a_training_that_holds_images_out_looks_for_many(
    held_out: float, count: int, flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "mine.yaml"
    training = {"iterations": 1, "weights": "none", "held_out": held_out}
    rules = [{"spec": {"bits": 4}}]
    text = {"name": "mine", "rules": rules, "reconstruction": training}
    policy.write_text(yaml.safe_dump(text))
    common = ["--policy", str(policy), "--data", str(flat), "--out", str(tmp_path)]
    assert main(["compile", "vit_tiny_patch16_224", *ARGS, "--random-weights", *common]) == 0
    captured = capsys.readouterr()
    assert f"has 3 images, {count} were asked for" in captured.err
    assert ("trained on 3 images; hundreds" in captured.out) == bool(held_out)


@pytest.mark.usefixtures("no_export")
def test_compile_a_torchvision_model_at_another_size(
    flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--random-weights", "--data", str(flat), "--out", str(tmp_path)]
    start = ["compile", "torchvision/vit_b_16", *common]
    error = fails(capsys, *start, "--model-arg", "image_size=32", "num_layers=1")
    assert "torchvision cannot make vit_b_16 with image_size=32, num_layers=1" in error
    squeezenet = ["compile", "torchvision/squeezenet1_1", *common, "--image-size", "64"]
    assert main([*squeezenet, "--model-arg", "num_classes=4"]) == 0
    assert "(3, 64, 64)" in capsys.readouterr().out


def test_the_seed_decides_which_images_calibrate(photos: Path) -> None:
    data = commands.open_data(str(photos), timm_preprocessing("deit_tiny"), labelled=True)
    chosen = [commands.batches(data, 4, 2, seed).dataset.indices for seed in (0, 0, 1)]  # type: ignore[attr-defined]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 4


def test_preprocessing_is_the_library_s_own() -> None:
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (300, 280, 3), dtype=np.uint8)
    )
    found = timm_preprocessing("swin_tiny_patch4_window7_224")
    config = timm.data.resolve_model_data_config(timm.create_model("swin_tiny_patch4_window7_224"))
    assert torch.equal(found.transform()(image), timm.data.create_transform(**config)(image))
    import torchvision

    weights = torchvision.models.Swin_V2_T_Weights.DEFAULT.transforms()
    found = torchvision_preprocessing("swin_v2_t")
    assert torch.equal(found.transform()(image), weights(image))
    assert found.image_shape == (3, 256, 256)


# checkpoints


@pytest.mark.parametrize("wrapper", ["", "state_dict", "model", "model_ema"])
def test_usual_checkpoints_load(wrapper: str, model: torch.nn.Module, tmp_path: Path) -> None:
    from fxquant.cli.checkpoint import load_checkpoint

    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    path = tmp_path / "vit.pth"
    torch.save({wrapper: state, "epoch": 7} if wrapper else state, path)
    other = timm.create_model("vit_tiny_patch16_224", **TINY)
    load_checkpoint(other, path)
    assert torch.equal(other.head.weight, model.head.weight)


def test_a_checkpoint_of_another_model_names_the_keys(
    checkpoint: Path, flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["compile", VIT, *ARGS, "num_classes=3", "--data", flat, "--out", tmp_path / "o"]
    error = fails(capsys, *start, "--checkpoint", checkpoint)
    assert "head.weight is (7, 32), expected (3, 32)" in error
    torch.save({"head.weight": torch.zeros(3, 32), "tail.bias": torch.ones(1)}, tmp_path / "a.pt")
    error = fails(capsys, *start, "--checkpoint", tmp_path / "a.pt")
    assert "missing (pos_embed, " in error or "missing (cls_token, " in error
    assert "1 unexpected (tail.bias)" in error
    assert not (tmp_path / "o").exists()


def test_damaged_checkpoints_are_refused(
    checkpoint: Path, flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["compile", VIT, *ARGS, "--data", flat, "--out", tmp_path / "o", "--checkpoint"]
    short = tmp_path / "short.safetensors"
    short.write_bytes(checkpoint.read_bytes()[:-100])
    assert "short.safetensors is truncated" in fails(capsys, *start, short)
    torch.save({"head.weight": torch.zeros(300, 32)}, tmp_path / "whole.pth")
    (tmp_path / "short.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:-500])
    assert "short.pth is truncated" in fails(capsys, *start, tmp_path / "short.pth")
    (tmp_path / "text.pth").write_text("hello")
    assert "not a checkpoint" in fails(capsys, *start, tmp_path / "text.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "object.pth")
    assert "Python objects, which would run code" in fails(capsys, *start, tmp_path / "object.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "holds no state dict but list" in fails(capsys, *start, tmp_path / "list.pth")
    assert "missing.pth is not a file" in fails(capsys, *start, tmp_path / "missing.pth")


# errors of compile


def test_a_model_needs_weights(
    flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails(capsys, "compile", VIT, "--data", flat, "--out", tmp_path)
    assert "--checkpoint" in error
    assert "--pretrained" in error
    assert "--random-weights" in error


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("vit_tiny_patch16_225", "did you mean 'vit_tiny_patch16_224'"),
        ("timm/deit_smal_patch16_224", "no model 'deit_smal_patch16_224' in timm; did you mean"),
        ("torchvision/swin_v3_t", "did you mean 'swin_v2_t'"),
        ("glyph_vitt", "did you mean 'glyph_vit'"),
        ("tim/vit_tiny_patch16_224", "did you mean 'timm'"),
    ],
)
def test_an_unknown_model_has_a_suggestion(
    name: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hint in fails(capsys, "compile", name, "--data", tmp_path, "--out", tmp_path)


def test_model_arguments_that_do_not_fit(
    flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["compile", VIT, "--random-weights", "--data", flat, "--out", tmp_path]
    error = fails(capsys, *start, "--model-arg", "dpeth=1")
    assert "dpeth=1" in error
    assert "Check --model-arg" in error
    with pytest.raises(SystemExit, match="2"):
        main([*map(str, start), "--model-arg", "depth"])
    assert "'depth' is not KEY=VALUE" in capsys.readouterr().err


def test_without_a_network_pretrained_says_what_to_do(
    flat: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise socket.gaierror("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in (VIT, "torchvision/squeezenet1_1"):
        error = fails(capsys, "compile", name, "--pretrained", "--data", flat, "--out", tmp_path)
        assert "cannot download the weights" in error
        assert "--checkpoint FILE" in error


def test_data_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["compile", VIT, *ARGS, "--random-weights", "--out", tmp_path / "o"]
    assert "--data is missing" in fails(capsys, *start)
    assert "nowhere does not exist" in fails(capsys, *start, "--data", tmp_path / "nowhere")
    (tmp_path / "empty" / "cats").mkdir(parents=True)
    assert "holds no images" in fails(capsys, *start, "--data", tmp_path / "empty")
    (tmp_path / "file").touch()
    assert "file is a file" in fails(capsys, *start, "--data", tmp_path / "file")
    assert "(3, 32, 32); give a folder" in fails(capsys, *start, "--data", "demo")


def test_a_demo_model_without_data_is_calibrated_on_images_of_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calibration: list[torch.Tensor] = []

    def record(_: torch.nn.Module, images: list[torch.Tensor], *__: object, **___: object) -> None:
        calibration.append(torch.cat(images))
        raise DataError("recorded")

    monkeypatch.setattr(commands, "compile", record)
    start = ["compile", "glyph_vit", "--images", "4", "--out", tmp_path]
    for arguments in ([], ["--data", "demo"]):
        assert "recorded" in fails(capsys, *start, *arguments)
    assert calibration[0].shape == (4, 3, 64, 64) and torch.equal(*calibration)


@pytest.mark.parametrize("nested", [False, True])
def test_a_corrupt_image_is_named(
    nested: bool, flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cats" if nested else tmp_path
    draw(folder / "good.png", 0)
    (folder / "broken.png").write_bytes((folder / "good.png").read_bytes()[:900])
    start = ["compile", VIT, *ARGS, "--random-weights", "--out", tmp_path / "o"]
    assert f"{folder / 'broken.png'} cannot be read" in fails(capsys, *start, "--data", tmp_path)
    (folder / "broken.png").write_text("text")
    assert f"{folder / 'broken.png'} cannot be read" in fails(capsys, *start, "--data", tmp_path)


def test_policies_that_do_not_exist_or_are_wrong(
    flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["compile", VIT, *ARGS, "--random-weights", "--data", flat, "--out", tmp_path]
    assert "did you mean 'w8a8'" in fails(capsys, *start, "--policy", "w8a9")
    assert "none.yaml" in fails(capsys, *start, "--policy", tmp_path / "none.yaml")
    policy = tmp_path / "bad.yaml"
    policy.write_text("name: bad\nrules:\n  - specs: {bits: 8}\n")
    assert "bad.yaml:3: unknown key 'specs'" in fails(capsys, *start, "--policy", policy)


def test_an_output_that_cannot_be_written_is_found_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    start = ["compile", VIT, *ARGS, "--random-weights", "--data", tmp_path]
    assert "file is a file" in fails(capsys, *start, "--out", tmp_path / "file" / "deep")


def test_a_failed_export_leaves_nothing(
    flat: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise LoweringError("no form for this operator")

    arguments = ["compile", VIT, *ARGS, "--random-weights", "--data", flat, "--out", tmp_path / "o"]
    assert "x87" in fails(capsys, *arguments, "--target", "x87")
    monkeypatch.setattr(fxquant.CompiledModel, "export_onnx", refuse)
    assert "no form for this operator" in fails(capsys, *arguments)
    assert not (tmp_path / "o").exists()
