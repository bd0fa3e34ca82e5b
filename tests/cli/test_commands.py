"""The command line, run as a user runs it: on folders of images and a tiny model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image

import fxquant
from fxquant.backends.onnx_qdq.difference import Difference
from fxquant.cli import commands, demo, main
from fxquant.cli.data import read_image
from fxquant.cli.evaluation import Score
from fxquant.cli.preprocess import read_preprocessing, timm_preprocessing
from fxquant.errors import DataError, FileFormatError
from tests.helpers.cli_helpers import ARGS, TINY, VIT, draw, draw_flat, fails
from tests.helpers.refusals import refused


@pytest.fixture(scope="module")
def compiled(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``fxquant compile`` wrote for the tiny ViT."""
    out = tmp_path_factory.mktemp("out") / "new" / "vit"
    arguments = ["compile", VIT, *ARGS, "--random-weights", "--data", str(photos)]
    assert main([*arguments, "--images", "8", "--batch-size", "4", "--out", str(out)]) == 0
    return out


def test_compile_writes_a_model_that_loads_and_its_preprocessing(compiled: Path) -> None:
    names = {"model.onnx", "quant_config.json", "model.safetensors", "preprocessing.json"}
    assert {path.name for path in compiled.iterdir()} == names
    settings = json.loads((compiled / "preprocessing.json").read_text())["settings"]
    assert settings["input_size"] == [3, 32, 32]
    assert settings["mean"] == [0.5, 0.5, 0.5]
    torch.manual_seed(0)  # as --seed does
    model = timm.create_model("vit_tiny_patch16_224", **TINY).eval()
    images = 2 * torch.rand(4, 3, 32, 32) - 1  # as the calibration images are
    wanted = model(images)
    error = (fxquant.load(compiled)(images) - wanted).norm() / wanted.norm()
    assert error < 0.1


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
    data = commands.open_data(str(photos), found, labelled=True)
    images, labels = next(iter(commands.batches(data, None, 14, 0)))
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


@pytest.mark.parametrize(
    ("option", "values", "message"),
    [
        ("--std", ("0", "0.5", "0.5"), "std must be of values in 0..1, above 0, got 0.0, 0.5, 0.5"),
        ("--std", ("0.5", "nan", "0.5"), "std must be of values"),
        ("--mean", ("123.7", "116.3", "103.5"), "divide those of values in 0..255 by 255"),
        ("--mean", ("-0.1", "0", "0"), "mean must be of values in 0..1, got -0.1"),
    ],
)
def test_means_and_deviations_that_cannot_be_are_refused(
    compiled: Path,
    photos: Path,
    option: str,
    values: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in fails(capsys, "eval", compiled, "--data", photos, option, *values)
    plain = ["0", "0", "0"] if option == "--mean" else ["1", "1", "1"]
    assert main(["eval", str(compiled), "--data", str(photos), option, *plain]) == 0


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_sixteen_bits_of_gray_are_scaled_not_clipped(tmp_path: Path, name: str) -> None:
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(ramp).save(tmp_path / name)
    found = np.asarray(read_image(tmp_path / name))
    assert found.shape == (16, 16, 3) and found.dtype == np.uint8
    assert found[..., 1].flatten().tolist() == list(range(256))


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_images_of_numbers_without_a_range_are_refused(tmp_path: Path, kind: type) -> None:
    Image.fromarray(np.ones((16, 16), dtype=kind)).save(tmp_path / "x.tif")
    text = r"x\.tif cannot be read .*have no known range"
    with refused(DataError, text, got=tmp_path / "x.tif"):
        read_image(tmp_path / "x.tif")


def test_a_preprocessing_file_with_a_deviation_of_zero_is_damaged(tmp_path: Path) -> None:
    plain = timm_preprocessing("vit_tiny_patch16_224")
    file = tmp_path / "preprocessing.json"
    file.write_text(plain.to_json().replace('"std": [\n   0.5', '"std": [\n   0.0'))
    with refused(FileFormatError, r"is damaged .*std must be of values", got=file):
        read_preprocessing(file)
    file.write_text("[" * 100_000)
    with refused(FileFormatError, "is damaged", got=file):
        read_preprocessing(file)


@pytest.mark.parametrize(("classes", "shown"), [(5, False), (6, True)])
def test_five_of_five_classes_are_no_measure(classes: int, shown: bool) -> None:
    score = Score(
        name="x", top1=0.5, top5=1.0, classes=classes, seconds=1.0, predictions=torch.zeros(4)
    )
    assert ("top-5" in str(score)) == shown


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


def test_eval_of_a_foreign_file_of_fixed_batch_and_other_type(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A classifier on (4, 3, 32, 32): 14 images need the last batch filled up."""
    for name, kind in (("float", onnx.TensorProto.FLOAT), ("double", onnx.TensorProto.DOUBLE)):
        value = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            [
                onnx.helper.make_node("ReduceMean", ["x"], ["mean"], axes=[2], keepdims=0),
                onnx.helper.make_node("Flatten", ["mean"], ["scores"]),
            ],
            "classifier",
            [value("x", kind, [4, 3, 32, 32])],
            [value("scores", kind, [4, 96])],
        )
        opset = [onnx.helper.make_opsetid("", 13)]
        model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
        onnx.save(model, tmp_path / f"{name}.onnx")
    options = ["--data", str(photos), "--model", "resnet18"]
    assert main(["eval", str(tmp_path / "float.onnx"), *options]) == 0
    assert "14 images" in capsys.readouterr().out
    assert "float32 images" in fails(capsys, "eval", tmp_path / "double.onnx", *options)


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
    monkeypatch.setattr(module, "optimization_difference", lambda *_: Difference(relative_l2=0.5))
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
    read = fxquant.policies.policy_file.read_policy(tmp_path / "w8a8.yaml")
    assert read == fxquant.policies.w8a8()
    assert main(["policies", "minmax", "--describe"]) == 0
    assert "weight_bits" in capsys.readouterr().out
    assert "did you mean 'w8a8'" in fails(capsys, "policies", "w8a")


def test_presets_take_widths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policies", "ptq4vit", "--weight-bits", "4", "--act-bits", "6"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    read = fxquant.policies.policy_file.read_policy(tmp_path / "mine.yaml")
    assert read == fxquant.policies.ptq4vit(4, 6)
    assert "w8a8 has no act_bits" in fails(capsys, "policies", "w8a8", "--act-bits", "4")
    out = tmp_path / "out"
    compiled = [
        "compile",
        VIT,
        *ARGS,
        "--random-weights",
        "--out",
        out,
        "--data",
        draw_flat(tmp_path / "flat"),
    ]
    message = fails(capsys, *compiled, "--policy", tmp_path / "mine.yaml", "--act-bits", "4")
    assert "has its own widths" in message
    assert (
        main([*map(str, compiled), "--policy", "minmax", "--act-bits", "6", "--images", "3"]) == 0
    )
    assert fxquant.load(out).report.policy == "minmax_w8a6"


def assert_readme_lists(printed: str) -> None:
    """README has the demo's output: the same lines but for figures and what comes next."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    listing = readme.partition("The demo prints:\n\n```\n")[2].partition("\n```\n")[0].splitlines()
    # Figures have other digits here, and therefore other spaces around them.
    texts = [
        [re.sub(r"[\d. ]+", " ", line) for line in lines]
        for lines in (listing, printed.splitlines())
    ]
    assert texts[0][:-1] == texts[1][:-1]
    assert listing[-1] == demo.NEXT


def test_the_demo_prints_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--images", "40", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for row in ("torch float32", "torch simulation", "onnxruntime", "integer kernels"):
        assert f"│ {row}" in printed
    assert printed.rstrip().endswith(f"next: fxquant eval {out} --data demo")
    assert_readme_lists(printed)
    assert main(["eval", str(out), "--data", "demo", "--images", "40"]) == 0
    assert "40 images" in capsys.readouterr().out


def test_a_demo_model_needs_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "did you mean 'glyph_vit'" in fails(capsys, "demo", "--model", "glif_vit")
    error = fails(capsys, "compile", "glyph_vit", "--random-weights", "--out", tmp_path)
    assert "glyph_vit is already trained" in error


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

    monkeypatch.setattr(commands, "find_model", interrupt)
    assert main(["compile", "vit_tiny_patch16_224", "--out", "x"]) == 130
    assert capsys.readouterr().err.startswith("interrupted: the same command continues a search")


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
