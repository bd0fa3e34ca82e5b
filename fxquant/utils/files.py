"""Writing files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from fxquant.errors import OutputError


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Writes beside ``path`` and renames, so that no half-written file is ever there.

    Args:
        path: the file wanted; its folder is made.
        write: called with a temporary path in the same folder; what it writes there becomes
            ``path``.

    Raises:
        OutputError: the folder or file cannot be written, or the disk is full.
    """
    write_together({path: write})


def write_together(files: Mapping[Path, Callable[[Path], None]]) -> None:
    """Writes files that belong together: all of them, or none.

    Args:
        files: as in :func:`write_whole`, for each file; of a link, what it leads to is written.

    Raises:
        OutputError: one of them cannot be written, or is there and no file: a pipe or device.
    """
    files = {path.resolve() if path.is_symlink() else path: write for path, write in files.items()}
    path = Path()
    temporary: dict[Path, Path] = {}
    made: list[Path] = []
    try:
        for path, write in files.items():
            made += _make_folder(path.parent)
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a folder")
            if path.exists() and not path.is_file():  # renaming would put a file in its place
                raise OSError(f"{path} is a pipe or device")
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            os.close(handle)
            temporary[path] = Path(name)
            write(temporary[path])
            temporary[path].chmod(0o666 & ~_umask())
        for path in files:
            os.replace(temporary[path], path)
        made.clear()
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}. Choose a writable "
            "folder with enough free space; nothing half-written was left"
        ) from error
    finally:
        for leftover in temporary.values():
            leftover.unlink(missing_ok=True)
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()


def _make_folder(folder: Path) -> list[Path]:
    """Makes a folder and its parents; those that were not there, outermost first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()][::-1]
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` as UTF-8, whole or not at all; errors as in :func:`write_whole`."""
    write_whole(path, lambda temporary: write_utf8(temporary, text))


def write_utf8(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` itself; for :func:`write_together`."""
    path.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_writable(folder: Path) -> None:
    """Looks whether files can be written in a folder, made or not, before long work.

    Raises:
        OutputError: they cannot.
    """
    near = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not near.is_dir():
        raise OutputError(f"cannot write in {folder}: {near} is a file; choose another folder")
    try:
        with tempfile.TemporaryDirectory(prefix=".fxquant.", dir=near):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write in {folder}: {error.strerror} for {near}; choose another folder"
        ) from error
