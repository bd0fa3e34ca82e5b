"""Arguments of each command."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import Any

from fxquant._version import __version__
from fxquant.config.allocation import Budget, Cost, Method
from fxquant.config.effort import Effort

# Options of presets that the command line has.
PRESET_OPTIONS = ("weight_bits", "act_bits", "end_bits", "effort", "full")
_MODEL_HELP = "timm/NAME, torchvision/NAME, NAME (timm first), glyph_vit or glyph_swin"
_DATA_HELP = "folder of images, or `demo` for the built-in glyph images"


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of all commands."""
    # Global options may come before or after the command; a default of the latter would override.
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--verbose", action="store_true", help="log what is done on stderr")
    common.add_argument("--threads", type=_count, metavar="N", help="CPU threads")
    parser = argparse.ArgumentParser(
        prog="fxquant",
        description="Quantizes vision transformers after training.",
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"fxquant {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_compile, _add_eval, _add_doctor, _add_pareto, _add_policies, _add_demo):
        add(commands, common)
    return parser


def budget_of(options: argparse.Namespace) -> Budget | None:
    """The budget of the command line; None where no cost is bounded.

    Raises:
        PolicyError: a bound is not a positive number.
    """
    limits = {str(cost): getattr(options, cost, None) for cost in Cost}
    bounded = {cost: limit for cost, limit in limits.items() if limit is not None}
    return Budget(**bounded) if bounded else None


def _add_compile(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "compile", parents=[common], help="quantize a model and write it for onnxruntime"
    )
    parser.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    _add_weights(parser)
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help=f"calibration: {_DATA_HELP}, which glyph_vit and glyph_swin use without --data",
    )
    parser.add_argument(
        "--images",
        type=_count,
        help="number of calibration images (32; 1024 with policies that hold some out for "
        "validation: best with effort minutes or hours, aiqvit)",
    )
    parser.add_argument(
        "--batch-size", type=_count, default=8, help="calibration images in each batch (8)"
    )
    parser.add_argument(
        "--policy", default="best", help="preset (see `fxquant policies`) or YAML file (best)"
    )
    _add_preset_options(parser)
    _add_budget(parser)
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of chosen images and of random weights (0)",
    )
    parser.add_argument(
        "--target", default="auto", help="CPUs that the ONNX file is for (auto: this machine's)"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write the model in"
    )
    _add_preprocessing(parser)


def _add_eval(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "eval",
        parents=[common],
        help="measure accuracy, or the error of other outputs, and speed",
        description="Measures the accuracy of a classifier on labelled images. Outputs that are "
        "not logits, such as maps, tokens and embeddings, are compared with the float model's.",
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="folder from compile, or .onnx")
    parser.add_argument(
        "--data",
        required=True,
        metavar="FOLDER",
        help="folder with one subfolder per class, or of images where outputs are compared, or "
        "`demo` for the built-in glyph images",
    )
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="compare the outputs with those of this float model: a name, with the options of its "
        "weights below, an .onnx file, or a folder from compile",
    )
    parser.add_argument(
        "--outputs",
        choices=("auto", "logits", "features"),
        default="auto",
        help="meaning of outputs (B, C); auto is as the report of the compiled model has it, "
        "and logits for an .onnx file",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument(
        "--backend",
        choices=("torch", "onnx", "integer"),
        help="torch simulates; the default is onnx, or torch in a folder without model.onnx",
    )
    parser.add_argument("--images", type=_count, help="number of images, chosen by --seed (all)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed that chooses the images where --images is given (0)",
    )
    parser.add_argument("--batch-size", type=_count, default=8, help="images in each batch (8)")
    parser.add_argument("--model", help="use the preprocessing of this timm or torchvision model")
    _add_weights(parser.add_argument_group("weights", "of a --reference that is a name"))
    _add_preprocessing(parser)


def _add_doctor(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "doctor", parents=[common], help="check how onnxruntime runs a quantized ONNX file"
    )
    parser.add_argument("path", type=Path, metavar="FILE.onnx", help="quantized file to check")
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help=f"run the file on these images: {_DATA_HELP}; without it on random numbers",
    )
    parser.add_argument(
        "--images",
        type=_count,
        default=8,
        metavar="N",
        help="number of images of --data to run the file on (8)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed that chooses the images of --data (0)",
    )
    parser.add_argument("--model", help="use the preprocessing of this timm or torchvision model")
    _add_preprocessing(parser)


def _add_pareto(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "pareto",
        parents=[common],
        help="plot loss against cost, from the sensitivities of a model compiled with a budget",
    )
    parser.add_argument("path", type=Path, metavar="DIR", help="folder from compile")
    parser.add_argument(
        "--cost", choices=[str(cost) for cost in Cost], default="mean_bits", help="(mean_bits)"
    )
    parser.add_argument(
        "--steps",
        type=_count,
        default=25,
        help="number of budgets from the least to the largest cost (25)",
    )


def _add_policies(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("policies", parents=[common], help="list or print the presets")
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this preset as YAML")
    parser.add_argument("--describe", action="store_true", help="explain it instead")
    _add_preset_options(parser)


def _add_demo(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "demo", parents=[common], help="quantize a small shipped model and compare the runtimes"
    )
    parser.add_argument("--model", default="glyph_vit", help="glyph_vit or glyph_swin")
    parser.add_argument("--images", type=_count, default=1000, help="test images (1000)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to keep the files in")


def _add_weights(parser: argparse._ActionsContainer) -> None:
    """Adds the options of a model's weights and of its constructor."""
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help=".safetensors or .pth; a state dict, plain or under state_dict, model or model_ema "
        "(averaged weights are preferred)",
    )
    weights.add_argument("--pretrained", action="store_true", help="download the weights")
    weights.add_argument(
        "--random-weights",
        action="store_true",
        help="random weights: to try out speed and coverage",
    )
    parser.add_argument(
        "--model-arg",
        action="extend",
        nargs="+",
        default=[],
        type=_key_value,
        metavar="KEY=VALUE",
        help="argument of the model's constructor; repeatable",
    )


def _add_preset_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options in ``PRESET_OPTIONS``."""
    for kind, tensors in (("weight", "weights"), ("act", "activations")):
        parser.add_argument(
            f"--{kind}-bits", type=_count, metavar="N", help=f"width of the preset's {tensors} (8)"
        )
    parser.add_argument(
        "--end-bits",
        type=_count,
        metavar="N",
        help="least width of the first and last layers' weights in preset best (8)",
    )
    parser.add_argument(
        "--effort",
        choices=[str(effort) for effort in Effort],
        help="time that preset best may take (seconds); below 8 bits seconds trains the scales of "
        "small classifiers and the weights of networks without classes, minutes and hours train "
        "all weights, on hundreds of --images",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        default=None,
        help="also quantize norms, softmax, activation functions and additions",
    )


def _add_budget(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "mixed precision", "each edge gets its own width, for the least loss within a budget"
    )
    for cost, meaning in (
        (Cost.MEAN_BITS, "mean width of all weights and activations"),
        (Cost.MEAN_WEIGHT_BITS, "mean width of the weights"),
        (Cost.MEAN_ACT_BITS, "mean width of the activations of one image"),
        (Cost.WEIGHT_BYTES, "bytes of all weights"),
        (Cost.BITOPS, "multiplications times both widths, for one image"),
    ):
        option = f"--{cost.replace('_', '-')}"
        group.add_argument(option, type=float, metavar="X", help=f"upper bound: {meaning}")
    group.add_argument(
        "--allocate",
        choices=[str(method) for method in Method],
        help="method (that of the preset, otherwise exact)",
    )


def _add_preprocessing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("preprocessing", "replaces the model's own")
    group.add_argument("--image-size", type=_count, metavar="PIXELS", help="height and width")
    for name in ("mean", "std"):
        group.add_argument(
            f"--{name}",
            type=float,
            nargs=3,
            metavar=("R", "G", "B"),
            help=f"{name} of values in 0..1",
        )


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def _key_value(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, for example img_size=224")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
