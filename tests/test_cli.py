"""The command line, run as a user runs it: on folders of images and tiny models."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
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
from fxquant import cli_commands
from fxquant.cli import main
from fxquant.cli_preprocess import timm_preprocessing, torchvision_preprocessing

VIT = "timm/vit_tiny_patch16_224"
TINY = {"depth": 1, "img_size": 32, "embed_dim": 32, "num_heads": 2, "num_classes": 7}
ARGS = ["--model-arg", *(f"{key}={value}" for key, value in TINY.items())]


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with seven class folders of two images each."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(14):
        draw(folder / f"class{i % 7}" / f"{i}.png", i)
    return folder


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three images, and a file that is no image."""
    folder = tmp_path_factory.mktemp("flat")
    for i in range(3):
        draw(folder / f"{i}.jpg", i)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(3)
    return timm.create_model("vit_tiny_patch16_224", **TINY).eval()


@pytest.fixture(scope="module")
def checkpoint(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "vit.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def compiled(photos: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``fxquant compile`` wrote for the tiny ViT."""
    out = tmp_path_factory.mktemp("out") / "new" / "vit"
    arguments = ["compile", VIT, *ARGS, "--checkpoint", str(checkpoint), "--data", str(photos)]
    assert main([*arguments, "--images", "8", "--batch-size", "4", "--out", str(out)]) == 0
    return out


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The message of a command that ends with exit code 2 and no traceback."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") or "\nerror: " in captured.err
    assert "Traceback" not in captured.err
    return captured.err


# compile


def test_compile_writes_a_model_that_loads_and_its_preprocessing(
    compiled: Path, model: torch.nn.Module
) -> None:
    names = {"model.onnx", "quant_config.json", "model.safetensors", "preprocessing.json"}
    assert {path.name for path in compiled.iterdir()} == names
    settings = json.loads((compiled / "preprocessing.json").read_text())["settings"]
    assert settings["input_size"] == [3, 32, 32]
    assert settings["mean"] == [0.5, 0.5, 0.5]
    images = torch.randn(4, 3, 32, 32)
    wanted = model(images)
    error = (fxquant.load(compiled)(images) - wanted).norm() / wanted.norm()
    assert error < 0.1


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilation without writing, where the files are not what is tested."""

    def nothing(compiled: fxquant.CompiledModel, *_: object) -> str:
        return f"nothing written for {compiled.image_shape}"

    monkeypatch.setattr(cli_commands, "write_artifacts", nothing)


@pytest.mark.usefixtures("no_export")
def test_compile_prints_the_summary_and_what_stayed_float(
    flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "mine.yaml"
    rules = [{"fed_by": "softmax", "spec": None}, {"spec": {"bits": 8}}]
    policy.write_text(yaml.safe_dump({"name": "mine", "rules": rules}))
    arguments = ["compile", "vit_tiny_patch16_224", *ARGS, "--random-weights", "--policy"]
    assert main([*arguments, str(policy), "--data", str(flat), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "mine: " in printed
    assert "3 calibration images" in printed
    assert "stayed float: blocks_0_attn" in printed


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
    data = cli_commands.open_data(str(photos), timm_preprocessing("deit_tiny"), labelled=True)
    chosen = [cli_commands.batches(data, 4, 2, seed).dataset.indices for seed in (0, 0, 1)]  # type: ignore[attr-defined]
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
    from fxquant.cli_checkpoint import load_checkpoint

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
    assert "no checkpoint" in fails(capsys, *start, tmp_path / "text.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "object.pth")
    assert "Python objects, which would run code" in fails(capsys, *start, tmp_path / "object.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "holds no state dict but list" in fails(capsys, *start, tmp_path / "list.pth")
    assert "missing.pth is no file" in fails(capsys, *start, tmp_path / "missing.pth")


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
    arguments = ["compile", VIT, *ARGS, "--random-weights", "--data", flat]
    error = fails(capsys, *arguments, "--out", tmp_path / "o", "--target", "x87")
    assert "x87" in error
    assert not (tmp_path / "o").exists()


# eval and doctor


@pytest.mark.parametrize("backend", [[], ["--backend", "torch"], ["--backend", "integer"]])
def test_eval_of_a_folder(
    backend: list[str], compiled: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(compiled), "--data", str(photos), *backend]) == 0
    printed = capsys.readouterr().out
    name = {"torch": "torch simulation", "integer": "integer kernels"}.get(
        "".join(backend[1:]), "model.onnx in onnxruntime"
    )
    assert printed.startswith(f"{name}: 14 images, top-1 ")
    assert "images/s" in printed


def test_eval_counts_what_the_model_gets_right(
    compiled: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = timm_preprocessing("vit_tiny_patch16_224").changed(size=32)
    data = cli_commands.open_data(str(photos), found, labelled=True)
    images, labels = next(iter(cli_commands.batches(data, None, 14, 0)))
    right = (fxquant.load(compiled)(images).argmax(1) == labels).float().mean().item()
    assert main(["eval", str(compiled), "--data", str(photos), "--backend", "torch"]) == 0
    assert f"top-1 {right:.2%}" in capsys.readouterr().out


def test_eval_of_a_bare_onnx_file_needs_a_preprocessing(
    compiled: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "vit.onnx"
    path.write_bytes((compiled / "model.onnx").read_bytes())
    start = ["eval", str(path), "--data", str(photos), "--images", "3"]
    error = fails(capsys, *start)
    assert "--model NAME, or --image-size, --mean and --std" in error
    mean = ["--mean", "0.5", "0.5", "0.5", "--std", "0.5", "0.5", "0.5"]
    for options in (["--model", VIT], mean):
        assert main([*start, *options]) == 0
        assert "vit.onnx in onnxruntime: 3 images" in capsys.readouterr().out
    assert "set --image-size" in fails(capsys, *start, "--model", VIT, "--image-size", "48")
    assert "needs the folder" in fails(capsys, *start, "--backend", "integer")


def test_eval_errors(
    compiled: Path, flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nowhere does not exist" in fails(capsys, "eval", tmp_path / "nowhere", "--data", flat)
    assert "one subfolder per class" in fails(capsys, "eval", compiled, "--data", flat)
    for i in range(9):
        draw(tmp_path / "nine" / f"class{i}" / "image.png", i)
    error = fails(capsys, "eval", compiled, "--data", tmp_path / "nine")
    assert "label 7" in error or "label 8" in error
    (tmp_path / "half").mkdir()
    for name in ("quant_config.json", "model.safetensors"):
        (tmp_path / "half" / name).write_bytes((compiled / name).read_bytes()[:-50])
    assert "truncated" in fails(capsys, "eval", tmp_path / "half", "--data", tmp_path / "nine")


def test_eval_notes_that_classes_differ(
    compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path / "cats" / "image.png", 0)
    assert main(["eval", str(compiled), "--data", str(tmp_path)]) == 0
    assert "1 class folders, the model 7 outputs" in capsys.readouterr().err


def test_a_damaged_preprocessing_file_is_refused(
    compiled: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.onnx").write_bytes((compiled / "model.onnx").read_bytes())
    for text in ("{", "[]", '{"format": 9}', '{"format": 1, "model": "x", "library": "timm"}'):
        (tmp_path / "preprocessing.json").write_text(text)
        error = fails(capsys, "eval", tmp_path, "--data", photos)
        assert "preprocessing.json" in error


def test_doctor(compiled: Path, flat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(compiled / "model.onnx")
    assert main(["doctor", path, "--data", str(flat)]) == 0
    printed = capsys.readouterr().out
    assert "integer kernels:" in printed
    assert ": ok" in printed


def test_doctor_of_damaged_files(
    compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "short.onnx"
    path.write_bytes((compiled / "model.onnx").read_bytes()[:5000])
    assert "short.onnx" in fails(capsys, "doctor", path)
    assert "none.onnx" in fails(capsys, "doctor", tmp_path / "none.onnx")


def test_doctor_exits_with_1_on_a_wrong_file(
    compiled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The package has a function of the module's name.
    module = sys.modules["fxquant.backends.onnx_qdq.doctor"]
    monkeypatch.setattr(module, "optimization_difference", lambda *_: 0.5)
    assert main(["doctor", str(compiled / "model.onnx")]) == 1
    assert "WRONG" in capsys.readouterr().out


# the rest


def test_policies_are_listed_and_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["policies"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == list(fxquant.policies.PRESETS)
    assert main(["policies", "w8a8"]) == 0
    (tmp_path / "w8a8.yaml").write_text(capsys.readouterr().out)
    read = fxquant.policy_file.read_policy(tmp_path / "w8a8.yaml")
    assert read == fxquant.policies.w8a8()
    assert main(["policies", "minmax", "--describe"]) == 0
    assert "weight_bits" in capsys.readouterr().out
    assert "did you mean 'w8a8'" in fails(capsys, "policies", "w8a")


def test_the_demo_prints_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--images", "40", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for row in ("torch float32", "torch simulation", "onnxruntime", "integer kernels"):
        assert f"│ {row}" in printed
    assert printed.rstrip().endswith(f"next: fxquant eval {out} --data demo")
    assert main(["eval", str(out), "--data", "demo", "--images", "40"]) == 0
    assert "40 images" in capsys.readouterr().out


def test_a_demo_model_needs_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "did you mean 'glyph_vit'" in fails(capsys, "demo", "--model", "glif_vit")
    error = fails(capsys, "compile", "glyph_vit", "--random-weights", "--out", tmp_path)
    assert "glyph_vit comes trained" in error


def test_the_module_runs() -> None:
    command = [sys.executable, "-m", "fxquant", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"fxquant {fxquant.__version__}"


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--debug", "policies", "x"], ["policies", "x", "--debug"]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "Traceback" in error
        assert "UnknownPresetError" in error


def test_interrupting_is_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_commands, "find_model", interrupt)
    assert main(["compile", "vit_tiny_patch16_224", "--out", "x"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_threads_are_set_and_checked(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    try:
        assert main(["policies", "--threads", "1"]) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    for wrong in ("0", "many"):
        with pytest.raises(SystemExit, match="2"):
            main(["policies", "--threads", wrong])
    assert "not a whole number" in capsys.readouterr().err
