"""Trained blocks on disk, so that an interrupted reconstruction goes on with the same numbers."""

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

# Raised with any change of the training, so that nothing trained before it is taken.
_FORMAT = 9
_ON_ITS_WAY = ".training"
_DIGEST = hashlib.sha256().digest_size


def _digest(path: Path, text: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the contents of a file and of the name of its block."""
    digest = hashlib.sha256(f"{path.stem} {text}".encode())
    for key in sorted(tensors):
        digest.update(key.encode() + tensors[key].numpy().tobytes())
    return digest.hexdigest()


def _damaged(path: Path, error: Exception) -> FileFormatError:
    return FileFormatError(f"{path} is damaged ({error}): delete it to train its block again")


class StateFile:
    """The file of an unfinished training of one block, bit for bit."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any] | None:
        """The state written last, on the CPU; None if there is none.

        Raises:
            FileFormatError: the file is damaged.
        """
        if not self.path.exists():
            return None
        try:
            with self.path.open("rb") as file:
                digest = file.read(_DIGEST)
                if hashlib.file_digest(file, "sha256").digest() != digest:
                    raise ValueError("its checksum is another")
                file.seek(_DIGEST)
                state = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise _damaged(self.path, error) from error
        assert isinstance(state, dict)
        return state

    def write(self, state: dict[str, Any]) -> None:
        """Writes the state in place of the last one.

        Raises:
            OutputError: it cannot be written.
        """
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_whole(self.path, lambda to: _write(to, buffer.getbuffer()))


def _write(path: Path, data: memoryview) -> None:
    with path.open("wb") as file:
        file.write(hashlib.sha256(data).digest())
        file.write(data)


class Checkpoints:
    """One file for each block that is done, and one for the state of the one in training.

    Args:
        folder: place of the files; None keeps nothing.
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
            # Sums depend on threads and device, and training on each digit of a sum.
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
            "with enough free space; what was trained so far and is there already is kept"
        )

    def state_file(self, number: int) -> StateFile | None:
        """The file for the state of a block in training; :meth:`put` deletes it."""
        path = self._path(number)
        return None if path is None else StateFile(path.with_suffix(_ON_ITS_WAY))

    def _path(self, number: int) -> Path | None:
        return None if self._folder is None else self._folder / f"block-{number}.safetensors"

    def get(self, number: int, device: torch.device) -> TrainingResult | None:
        """The result of a block that is done, on a device; None if it is not there.

        Raises:
            FileFormatError: the file is damaged.
        """
        path = self._path(number)
        if path is None or not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                about, digest = (file.metadata()[key] for key in ("fxquant", "sha256"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if _digest(path, about, tensors) != digest:
                raise ValueError("its checksum is another")
            moved = {key: tensor.to(device) for key, tensor in tensors.items()}
            return self._read(json.loads(about), moved)
        except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
            raise _damaged(path, error) from error

    @staticmethod
    def _read(about: dict[str, object], tensors: dict[str, Tensor]) -> TrainingResult:
        before, after = float(str(about["before"])), float(str(about["after"]))
        if not about["changed"]:
            return TrainingResult(None, before, after)
        groups: dict[str, dict[str, Tensor]] = {"weight": {}, "bias": {}, "state": {}}
        for key, tensor in tensors.items():
            kind, name = key.split("/", 1)
            groups[kind][name] = tensor
        quantizers = {}
        configs = about["quantizers"]
        assert isinstance(configs, dict)
        for name, config in configs.items():
            quantizers[name] = from_config(config)
            state = {
                k.rpartition("/")[2]: t
                for k, t in groups["state"].items()
                if k.rpartition("/")[0] == name
            }
            quantizers[name].load_state_dict(state, assign=True)
        ranks = about["ranks"]
        assert isinstance(ranks, dict)
        changes = Changes(quantizers, groups["weight"], groups["bias"], ranks)
        return TrainingResult(changes, before, after)

    def put(self, number: int, result: TrainingResult) -> None:
        """Keeps the result of a block, its tensors bit for bit.

        Raises:
            OutputError: it cannot be written.
        """
        path = self._path(number)
        if path is None:
            return
        if not path.exists():
            self._write(path, result)
        try:
            path.with_suffix(_ON_ITS_WAY).unlink(missing_ok=True)
        except OSError as error:
            raise self._not_written(error) from error

    @staticmethod
    def _write(path: Path, result: TrainingResult) -> None:
        tensors: dict[str, Tensor] = {}
        changes = result.changes
        about: dict[str, object] = {
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
            about["ranks"] = dict(changes.ranks)
            about["quantizers"] = {n: q.config() for n, q in changes.quantizers.items()}
        whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        text = json.dumps(about)
        metadata = {"fxquant": text, "sha256": _digest(path, text, whole)}
        write_whole(path, lambda to: save_file(whole, to, metadata=metadata))
