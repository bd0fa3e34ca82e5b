"""Measured losses on disk, one line each, so that an interrupted search goes on.

The first line names the model, images and policy. A file is named by a fingerprint of everything
that a loss depends on, so losses of another model, other images or other specs are never read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from fxquant.errors import FileFormatError, OutputError
from fxquant.utils.log import LOGGER

# A group at a width, or all groups each at its own.
Key = tuple[str, tuple[int, ...]]


class LossCache:
    """Losses measured so far.

    Args:
        folder: folder of the file; None keeps losses in memory only.
        fingerprint: fingerprint of everything that the losses depend on.
        about: description for readers of the file, plain JSON values.

    Raises:
        FileFormatError: the file was not written by this class.
        OutputError: the folder cannot be written.
    """

    def __init__(self, folder: Path | None, fingerprint: str, about: dict[str, Any]) -> None:
        self._losses: dict[Key, float] = {}
        self._path = None if folder is None else folder / f"sensitivity-{fingerprint[:16]}.jsonl"
        self._file: IO[str] | None = None
        self._head = json.dumps({"fingerprint": fingerprint, **about})
        if self._path is not None:
            self._open(self._path, fingerprint)

    def _open(self, path: Path, fingerprint: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes() if path.exists() else b""
            # A line that an interrupted run did not finish has no line break.
            complete = data[: data.rfind(b"\n") + 1]
            self._read(path, complete.splitlines(), fingerprint)
            if complete != data:
                os.truncate(path, len(complete))
            LOGGER.info("%d measured losses read from %s", len(self._losses), path)
            self._file = path.open("a", encoding="utf-8")
            if not complete:
                self._write(self._head)
        except OSError as error:
            raise self._not_written(error) from error

    def _read(self, path: Path, lines: list[bytes], fingerprint: str) -> None:
        for number, line in enumerate(lines, 1):
            try:
                values = json.loads(line)
                if number == 1 or "fingerprint" in values:  # a simultaneous run wrote a head too
                    if values["fingerprint"] != fingerprint:
                        raise ValueError("its fingerprint is not the one in its name")
                    continue
                loss = float(values["loss"])
                if not 0 <= loss < float("inf"):
                    raise ValueError(f"a loss of {loss}")
                self._losses[values["what"], tuple(values["bits"])] = loss
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                raise FileFormatError(
                    f"{path}, line {number} is damaged ({error}): delete the file to measure again",
                    got=path,
                ) from error

    def _not_written(self, error: OSError) -> OutputError:
        return OutputError(
            f"cannot write {self._path}: {error.strerror or error}. Choose a writable folder with "
            "enough free space; losses measured so far are kept in the file",
            got=self._path,
        )

    def __contains__(self, key: Key) -> bool:
        return key in self._losses

    def __getitem__(self, key: Key) -> float:
        return self._losses[key]

    def put(self, key: Key, loss: float) -> None:
        """Stores a loss, in memory and on disk, bit for bit.

        Raises:
            OutputError: the loss cannot be written.
        """
        self._losses[key] = loss
        LOGGER.debug("loss of %s at %s bits: %.6g", *key, loss)
        try:
            self._write(json.dumps({"what": key[0], "bits": list(key[1]), "loss": loss}))
        except OSError as error:
            raise self._not_written(error) from error

    def _write(self, line: str) -> None:
        if self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
