"""Integrity checks of a saved model whose files can be read.

Without these checks a wrong number in a file would be loaded silently and cause wrong outputs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, fx

from fxquant.config.spec import TensorSpec
from fxquant.errors import FileFormatError
from fxquant.graph.edges import possible_edges
from fxquant.graph.nodes import submodule
from fxquant.quantizers import FAMILIES, Quantizer

_ADVICE = "the file is damaged or was changed: compile and save the model again"
_CONFIG_KEY = "config_sha256"
# Key of the configuration; known only once the tensors are written, and not part of its own digest.
TENSORS_KEY = "tensors_sha256"


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def metadata(config: Mapping[str, Any]) -> dict[str, str]:
    """Metadata of the file of tensors: the digest of the configuration saved with it."""
    digested = {key: value for key, value in config.items() if key != TENSORS_KEY}
    text = json.dumps(digested, sort_keys=True)
    return {_CONFIG_KEY: hashlib.sha256(text.encode()).hexdigest()}


def check_tensors(path: Path, config: Mapping[str, Any]) -> None:
    """Checks that a file of tensors is the file that a configuration was saved with.

    Raises:
        FileFormatError: it is a different file.
    """
    actual, expected = digest(path), config[TENSORS_KEY]
    if actual != expected:
        raise FileFormatError(
            f"{path} is not the file that the configuration next to it was saved with (SHA-256 "
            f"{actual}, expected {expected!s:.64}): two saves are mixed or one file was changed; "
            "use both files of one save",
            got=actual,
            expected=expected,
        )


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Checks that a configuration was not changed since it was saved with a file of tensors.

    Raises:
        FileFormatError: the configuration was changed.
    """
    with safe_open(path, framework="pt") as file:
        saved_metadata = file.metadata() or {}
    if saved_metadata != metadata(config):
        raise FileFormatError(
            f"the configuration is not what {path} was saved with; {_ADVICE}", got=path
        )


def check_numbers(tensors: dict[str, Tensor]) -> None:
    """Checks that no tensor holds NaN; infinity is allowed, since attention masks hold it.

    Raises:
        FileFormatError: a tensor holds NaN.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise FileFormatError(f"tensor {name} holds NaN; {_ADVICE}", edge=name)


def check_quantizer(name: str, quantizer: Quantizer) -> None:
    """Checks the loaded numbers of a quantizer.

    Raises:
        FileFormatError: a scale is not positive and finite, or a zero point is not a code.
    """
    fault = quantizer.fault()
    if fault is not None:
        raise FileFormatError(f"quantizer {name}: {fault}; {_ADVICE}", edge=name)


def check_codes(name: str, codes: Tensor, bits: int) -> None:
    """Checks the codes of a weight, which are stored signed.

    Raises:
        FileFormatError: the codes are not integers, or exceed ``bits`` bits.
    """
    half = 1 << (bits - 1)
    if codes.dtype not in (torch.int8, torch.int16):
        raise FileFormatError(
            f"the codes of {name} are {codes.dtype}, not integers; {_ADVICE}",
            edge=name,
            got=codes.dtype,
            expected=(torch.int8, torch.int16),
        )
    low, high = (int(value) for value in codes.aminmax())
    if low < -half or high >= half:
        raise FileFormatError(
            f"the codes of {name} reach from {low} to {high}, and {bits} bits hold {-half} to "
            f"{half - 1}; {_ADVICE}",
            edge=name,
            got=(low, high),
            expected=f"{-half}..{half - 1}",
        )


def check_specs(gm: fx.GraphModule, specs: Mapping[str, TensorSpec]) -> None:
    """Checks that each edge that reads a quantizer has the spec of that quantizer, and no other.

    Args:
        gm: the rebuilt graph.
        specs: edge name -> spec, as saved.

    Raises:
        FileFormatError: a spec is missing, belongs to no quantizer, or is that of another one.
    """
    sources = {edge.name: submodule(gm, edge.source) for edge in possible_edges(gm)}
    quantizers = {name: q for name, q in sources.items() if isinstance(q, Quantizer)}
    if quantizers.keys() != specs.keys():
        name = min(quantizers.keys() ^ specs.keys())
        missing = "spec" if name in quantizers else "quantizer"
        raise FileFormatError(f"edge {name} has no {missing}; {_ADVICE}", edge=name)
    for name, quantizer in quantizers.items():
        spec = specs[name]
        kind = FAMILIES[spec.scheme].quantizer
        if quantizer.bits != spec.bits or type(quantizer) is not kind:
            raise FileFormatError(
                f"edge {name} has the spec of {spec.bits} bits, scheme {spec.scheme}, and a "
                f"{type(quantizer).__name__} of {quantizer.bits} bits; {_ADVICE}",
                edge=name,
                got=quantizer.bits,
                expected=spec.bits,
            )


def check_all_read(names: Iterable[str], graph: fx.Graph) -> None:
    """Checks that a graph reads all tensors that do not belong to a quantizer.

    Raises:
        FileFormatError: no node reads a tensor.
    """
    extra = sorted(set(names) - {str(n.target) for n in graph.nodes if n.op == "get_attr"})
    if extra:
        raise FileFormatError(
            f"no node of the graph reads tensor {extra[0]}; {_ADVICE}", edge=extra[0]
        )
