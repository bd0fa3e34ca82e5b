"""Weights from checkpoint files of common forms."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fxquant.errors import FileFormatError, ModelError

# Keys under which training scripts store the state dict. Averaged weights (EMA) come first, as in
# timm, since such scripts report the accuracy of these.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# Prefixes that DistributedDataParallel and torch.compile put before each name.
_PREFIXES = ("module.", "_orig_mod.")
# Number of parameters named in a message.
_NAMED = 3


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Loads a checkpoint into a model.

    Args:
        model: changed in place.
        path: ``.safetensors``, or a file of ``torch.save`` with nothing but tensors and plain
            values: a state dict, or a dict that holds one (see ``WRAPPERS``).

    Raises:
        FileFormatError: the file is missing, truncated, or holds other objects.
        ModelError: the weights are those of another model.
    """
    state = read_state(path)
    misfit = _misfit(model, state)
    if misfit:
        state = _convert(model, state)
        misfit = misfit if _misfit(model, state) else ""
    if misfit:
        raise ModelError(
            f"{path} does not fit the model: {misfit}. Check the model's name, and --model-arg "
            "(for example num_classes or img_size)",
            got=path,
        )
    model.load_state_dict(state)


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint; errors as in :func:`load_checkpoint`."""
    content: Any = _read(path)
    while isinstance(content, Mapping):
        inner = next((content[k] for k in WRAPPERS if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            break
        content = inner
    names = list(content) if isinstance(content, Mapping) else []
    tensors = {name: content[name] for name in names if isinstance(content[name], Tensor)}
    state = {_plain(str(name)): tensor for name, tensor in tensors.items()}
    if not state:
        what = f"a dict with keys {names[:_NAMED]}" if names else type(content).__name__
        raise FileFormatError(
            f"{path} holds no state dict but {what}; expected tensors by name, plain or under "
            f"one of {', '.join(WRAPPERS)}",
            got=path,
        )
    return state


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on foreign bytes the readers raise nearly anything
        if type(error).__name__ == "UnpicklingError":
            raise FileFormatError(
                f"{path} is damaged or holds Python objects, which would run code when loaded. "
                "Write it again with torch.save(model.state_dict(), path)",
                got=path,
            ) from error
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        raise FileFormatError(
            f"{path} is truncated, unreadable or not a checkpoint ({first}); copy or download it "
            "again",
            got=path,
        ) from error


def _plain(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _misfit(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Description of names and shapes that differ from the model's; empty if none do."""
    expected = model.state_dict()
    shapes = [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": shapes,
    }
    return "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:_NAMED])}{', …' if len(names) > _NAMED else ''})"
        for kind, names in problems.items()
        if names
    )


def _convert(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict in timm's names, where the model's module can convert the authors' names."""
    convert: Callable[..., dict[str, Tensor]] | None = getattr(
        sys.modules[type(model).__module__], "checkpoint_filter_fn", None
    )
    if convert is None:
        return state
    try:
        return convert(dict(state), model)
    except (LookupError, RuntimeError, ValueError, TypeError, AttributeError):
        return state  # timm cannot convert it: the first comparison explains that best
