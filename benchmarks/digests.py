"""Compares the compiled models of two checkouts bit by bit.

    python benchmarks/digests.py run --checkout ../before --out before.json
    python benchmarks/digests.py run --checkout . --out after.json
    python benchmarks/digests.py compare before.json after.json

``run`` compiles both shipped models with W8A8, MPTQ-ViT, PTQ4ViT and ``best``, and digests every
tensor and quantizer of the saved models, the simulated outputs, the ONNX file's codes and all
sizes. Results depend on the CPU and on the number of threads: compare runs of one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MODELS = ("glyph_vit", "glyph_swin")
RECIPES: dict[str, dict[str, Any]] = {
    "w8a8": {},
    "mptq_vit": {"weight_bits": 4, "act_bits": 4},
    "ptq4vit": {"weight_bits": 6, "act_bits": 6},
    "best": {"weight_bits": 4, "act_bits": 4},
}


def measure(model_name: str, preset: str, images: int, threads: int) -> dict[str, Any]:
    """Digests of one model compiled with one preset, by the fxquant that Python imports."""
    import onnx
    import torch
    from onnx import numpy_helper
    from safetensors.numpy import load_file

    import fxquant
    from fxquant import policies
    from fxquant.demo.glyphs import GlyphDataset
    from fxquant.demo.models import build

    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)
    loader = torch.utils.data.DataLoader(GlyphDataset("calib", images), batch_size=16)
    compiled = fxquant.compile(
        build(model_name), loader, policies.preset(preset, **RECIPES[preset])
    )
    tests, _ = GlyphDataset("test", 64).batch(range(64))
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        compiled.save(folder)
        compiled.export_onnx(folder / "model.onnx", target="x86-vnni")
        weights = onnx.load(folder / "model.onnx").graph.initializer
        config = json.loads((folder / "quant_config.json").read_text(encoding="utf-8"))
        return {
            "tensors": {
                k: digest(v.tobytes()) for k, v in load_file(folder / "model.safetensors").items()
            },
            "quantizers": config["quantizers"],
            "graph": [[node["name"], str(node["target"])] for node in config["graph"]],
            "outputs": digest(compiled(tests).numpy().tobytes()),
            "integer outputs": digest(compiled.lower("integer")(tests).numpy().tobytes()),
            "onnx codes": sorted(digest(numpy_helper.to_array(w).tobytes()) for w in weights),
            "onnx bytes": (folder / "model.onnx").stat().st_size,
            "output SQNR dB": compiled.report.output_sqnr,
            "SQNR dB": compiled.report.sqnr,
            "parameter bytes": compiled.report.quantized_bytes,
        }


def digest(data: bytes) -> str:
    """The first 16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def run(options: argparse.Namespace) -> None:
    """Measures every model and preset, each in a process that imports the checkout."""
    checkout = options.checkout.resolve()
    if not (checkout / "fxquant" / "__init__.py").is_file():
        sys.exit(f"{checkout} is not a checkout of fxquant: it has no fxquant/__init__.py")
    results = {}
    for model in MODELS:
        for preset in options.presets:
            widths = [str(options.images), str(options.threads)]
            done = subprocess.run(
                [sys.executable, str(Path(__file__).resolve()), "one", model, preset, *widths],
                env={**os.environ, "PYTHONPATH": str(checkout)},
                cwd=checkout,
                check=True,
                capture_output=True,
                text=True,
            )
            results[f"{model} {preset}"] = json.loads(done.stdout.splitlines()[-1])
            print(f"{model} {preset}: {len(results[f'{model} {preset}']['tensors'])} tensors")
    options.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


def compare(options: argparse.Namespace) -> None:
    """Prints every figure that differs, and exits with 1 where a figure differs."""
    old, new = (json.loads(p.read_text(encoding="utf-8")) for p in (options.before, options.after))
    differences = 0
    for name in sorted({*old, *new}):
        if name not in old or name not in new:
            print(f"{name}: in one of the two files only")
            differences += 1
            continue
        keys = sorted({*old[name], *new[name]})
        changed = [key for key in keys if old[name].get(key) != new[name].get(key)]
        print(f"{name}: {'the same' if not changed else 'differs in ' + ', '.join(changed)}")
        differences += len(changed)
    sys.exit(1 if differences else 0)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run", help="digest what a checkout makes of the models")
    runs.add_argument("--checkout", type=Path, required=True, help="folder that holds fxquant/")
    runs.add_argument("--out", type=Path, required=True, help="JSON file to write")
    runs.add_argument("--images", type=int, default=32, help="calibration images")
    runs.add_argument("--threads", type=int, default=1, help="threads of torch")
    runs.add_argument("--presets", nargs="+", choices=RECIPES, default=list(RECIPES))
    runs.set_defaults(call=run)
    compares = commands.add_parser("compare", help="compare two such files")
    compares.add_argument("before", type=Path)
    compares.add_argument("after", type=Path)
    compares.set_defaults(call=compare)
    one = commands.add_parser("one", help="digest one model and preset; used by run")
    one.add_argument("model", choices=MODELS)
    one.add_argument("preset", choices=RECIPES)
    one.add_argument("images", type=int)
    one.add_argument("threads", type=int)
    one.set_defaults(
        call=lambda o: print(json.dumps(measure(o.model, o.preset, o.images, o.threads)))
    )
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()
