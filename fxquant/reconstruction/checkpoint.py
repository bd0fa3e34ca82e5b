"""Trained blocks on disk: an interrupted reconstruction continues with the same numbers."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx

from fxquant.errors import FileFormatError, OutputError
from fxquant.graph.capture import device_of
from fxquant.graph.fingerprint import fingerprint
from fxquant.quantizers import Quantizer, from_config
from fxquant.reconstruction.trained_block import Changes, TrainingResult
from fxquant.utils.files import write_whole

# Increased with every change of the training: blocks trained before the change are not reused.
_FORMAT = 9
_UNFINISHED_SUFFIX = ".training"
_DIGEST_SIZE = hashlib.sha256().digest_size


def _digest(path: Path, text: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the contents of a file and of the name of its block."""
    digest = hashlib.sha256(f"{path.stem} {text}".encode())
    for key in sorted(tensors):
        digest.update(key.encode() + tensors[key].numpy().tobytes())
    return digest.hexdigest()


def _damaged(path: Path, error: Exception) -> FileFormatError:
    return FileFormatError(
        f"{path} is damaged ({error}): delete it to train its block again", got=path
    )


class StateFile:
    """The file of an unfinished training of one block, bit for bit."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any] | None:
        """The state written last, on the CPU; None if the file does not exist.

        Raises:
            FileFormatError: the file is damaged.
        """
        if not self.path.exists():
            return None
        try:
            with self.path.open("rb") as file:
                digest = file.read(_DIGEST_SIZE)
                if hashlib.file_digest(file, "sha256").digest() != digest:
                    raise ValueError("its checksum is another")
                file.seek(_DIGEST_SIZE)
                state = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise _damaged(self.path, error) from error
        assert isinstance(state, dict)
        return state

    def write(self, state: dict[str, Any]) -> None:
        """Writes the state over the previous state.

        Raises:
            OutputError: the file cannot be written.
        """
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_whole(self.path, lambda to: _write(to, buffer.getbuffer()))


def _write(path: Path, data: memoryview) -> None:
    with path.open("wb") as file:
        file.write(hashlib.sha256(data).digest())
        file.write(data)


class Checkpoints:
    """Files of a reconstruction: one for each trained block, one for the block in training.

    Args:
        folder: folder of the files; None keeps nothing.
        gm: the graph before the first block is changed.
        images: calibration images.
        settings: options of the training, as text.
    """

    def __init__(
        self, folder: Path | None, gm: fx.GraphModule, images: Tensor, settings: str
    ) -> None:
        self._folder: Path | None = None
        if folder is not None:
            configs = [q.config() for _, q in gm.named_modules() if isinstance(q, Quantizer)]
            # Sums depend on threads and device, and training depends on each digit of a sum.
            where = torch.get_num_threads(), str(device_of(gm))
            name = fingerprint(gm, images, f"{_FORMAT} {settings}", configs, where)[:16]
            self._folder = folder / f"reconstruction-{name}"
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise self._not_written(error) from error

    def _not_written(self, error: OSError) -> OutputError:
        return OutputError(
            f"cannot write {self._folder}: {error.strerror or error}. Choose a writable folder "
            "with enough free space; the blocks that are saved already are kept",
            got=self._folder,
        )

    def state_file(self, number: int) -> StateFile | None:
        """The file for the state of a block in training; :meth:`put` deletes it."""
        path = self._path(number)
        return None if path is None else StateFile(path.with_suffix(_UNFINISHED_SUFFIX))

    def _path(self, number: int) -> Path | None:
        return None if self._folder is None else self._folder / f"block-{number}.safetensors"

    def get(self, number: int, device: torch.device) -> TrainingResult | None:
        """The result of a trained block, on a device; None if the block has no file.

        Raises:
            FileFormatError: the file is damaged.
        """
        path = self._path(number)
        if path is None or not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                description, digest = (file.metadata()[key] for key in ("fxquant", "sha256"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if _digest(path, description, tensors) != digest:
                raise ValueError("its checksum is another")
            on_device = {key: tensor.to(device) for key, tensor in tensors.items()}
            return self._read(json.loads(description), on_device)
        except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
            raise _damaged(path, error) from error

    @staticmethod
    def _read(description: dict[str, object], tensors: dict[str, Tensor]) -> TrainingResult:
        before, after = float(str(description["before"])), float(str(description["after"]))
        if not description["changed"]:
            return TrainingResult(None, before, after)
        groups: dict[str, dict[str, Tensor]] = {"weight": {}, "bias": {}, "state": {}}
        for key, tensor in tensors.items():
            kind, name = key.split("/", 1)
            groups[kind][name] = tensor
        quantizers = {}
        configs = description["quantizers"]
        assert isinstance(configs, dict)
        for name, config in configs.items():
            quantizers[name] = from_config(config)
            state = {
                k.rpartition("/")[2]: t
                for k, t in groups["state"].items()
                if k.rpartition("/")[0] == name
            }
            quantizers[name].load_state_dict(state, assign=True)
        ranks = description["ranks"]
        assert isinstance(ranks, dict)
        changes = Changes(quantizers, groups["weight"], groups["bias"], ranks)
        return TrainingResult(changes, before, after)

    def put(self, number: int, result: TrainingResult) -> None:
        """Saves the result of a block, its tensors bit for bit.

        Raises:
            OutputError: the file cannot be written.
        """
        path = self._path(number)
        if path is None:
            return
        if not path.exists():
            self._write(path, result)
        try:
            path.with_suffix(_UNFINISHED_SUFFIX).unlink(missing_ok=True)
        except OSError as error:
            raise self._not_written(error) from error

    @staticmethod
    def _write(path: Path, result: TrainingResult) -> None:
        tensors: dict[str, Tensor] = {}
        changes = result.changes
        description: dict[str, object] = {
            "before": repr(result.loss_before),
            "after": repr(result.loss_after),
            "changed": changes is not None,
        }
        if changes is not None:
            tensors |= {f"weight/{name}": value for name, value in changes.weights.items()}
            tensors |= {f"bias/{name}": value for name, value in changes.biases.items()}
            for name, quantizer in changes.quantizers.items():
                state = quantizer.state_dict()
                tensors |= {f"state/{name}/{key}": value for key, value in state.items()}
            description["ranks"] = dict(changes.ranks)
            description["quantizers"] = {n: q.config() for n, q in changes.quantizers.items()}
        on_cpu = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        text = json.dumps(description)
        metadata = {"fxquant": text, "sha256": _digest(path, text, on_cpu)}
        write_whole(path, lambda to: save_file(on_cpu, to, metadata=metadata))
