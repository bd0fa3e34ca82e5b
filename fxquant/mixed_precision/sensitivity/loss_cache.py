"""Measured losses on disk, one line each, written as measured, so that a search can go on.

The first line says what the losses belong to. A file is named by a fingerprint of all that a loss
depends on, so losses of another model, other images or other specs are never read.
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
        folder: where the file is; None keeps them in memory alone.
        fingerprint: of what they depend on.
        about: what a reader of the file may want to know, plain JSON values.

    Raises:
        FileFormatError: the file is not what this class wrote.
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
            # What an interrupted run left of a line has no end.
            whole = data[: data.rfind(b"\n") + 1]
            self._read(path, whole.splitlines(), fingerprint)
            if whole != data:
                os.truncate(path, len(whole))
            LOGGER.info("%d measured losses read from %s", len(self._losses), path)
            self._file = path.open("a", encoding="utf-8")
            if not whole:
                self._write(self._head)
        except OSError as error:
            raise self._not_written(error) from error

    def _read(self, path: Path, lines: list[bytes], fingerprint: str) -> None:
        for number, line in enumerate(lines, 1):
            try:
                values = json.loads(line)
                if number == 1 or "fingerprint" in values:  # a run at the same time made it too
                    if values["fingerprint"] != fingerprint:
                        raise ValueError("the fingerprint in it is another than in its name")
                    continue
                loss = float(values["loss"])
                if not 0 <= loss < float("inf"):
                    raise ValueError(f"a loss of {loss}")
                self._losses[values["what"], tuple(values["bits"])] = loss
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                raise FileFormatError(
                    f"{path}, line {number} is damaged ({error}): delete the file to measure anew"
                ) from error

    def _not_written(self, error: OSError) -> OutputError:
        return OutputError(
            f"cannot write {self._path}: {error.strerror or error}. Choose a writable folder with "
            "enough free space; what was measured so far is kept in it"
        )

    def __contains__(self, key: Key) -> bool:
        return key in self._losses

    def __getitem__(self, key: Key) -> float:
        return self._losses[key]

    def put(self, key: Key, loss: float) -> None:
        """Keeps a loss, on disk too, bit for bit.

        Raises:
            OutputError: it cannot be written.
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
