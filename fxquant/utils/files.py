"""Atomic writing of files: complete, or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from fxquant.errors import OutputError, PathTypeError


def as_path(value: object, name: str) -> Path:
    """The path that an argument names.

    Args:
        value: text or a path, such as ``pathlib.Path``.
        name: name of the argument.

    Raises:
        PathTypeError: the argument is neither text nor a path; it is also a ``TypeError``.
    """
    if not isinstance(value, str | os.PathLike):
        raise PathTypeError(
            f"{name} must be a path as text or pathlib.Path, got {value!r:.80}",
            got=value,
            expected=(str, Path),
        )
    return Path(value)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes to a temporary file next to ``path`` and renames it, so that no half is ever visible.

    Args:
        path: the file to write; its folder is made.
        write: writes the file to the temporary path that it is called with.

    Raises:
        OutputError: the folder or file cannot be written, or the disk is full.
    """
    write_together({path: write})


def write_together(files: Mapping[Path, Callable[[Path], object]]) -> None:
    """Writes several files: all of them, or none.

    Args:
        files: path -> function as in :func:`write_whole`; for a link its target is written.

    Raises:
        OutputError: a file cannot be written, or its path is a pipe or device.
    """
    files = {path.resolve() if path.is_symlink() else path: write for path, write in files.items()}
    path = Path()
    temporary: dict[Path, Path] = {}
    new_folders: list[Path] = []
    try:
        for path, write in files.items():
            new_folders += _make_folder(path.parent)
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a folder")
            if path.exists() and not path.is_file():  # renaming would replace it by a file
                raise OSError(f"{path} is a pipe or device")
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            os.close(handle)
            temporary[path] = Path(name)
            write(temporary[path])
            temporary[path].chmod(0o666 & ~_umask())
        for path in files:
            os.replace(temporary[path], path)
        new_folders.clear()
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}. Choose a writable "
            "folder with enough free space; nothing half-written was left",
            got=path,
        ) from error
    finally:
        for leftover in temporary.values():
            leftover.unlink(missing_ok=True)
        for folder in reversed(new_folders):
            with suppress(OSError):
                folder.rmdir()


def _make_folder(folder: Path) -> list[Path]:
    """Makes a folder and its parents; returns the new ones, outermost first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()][::-1]
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` as UTF-8, atomically; errors as in :func:`write_whole`."""
    write_whole(path, lambda temporary: write_utf8(temporary, text))


def write_utf8(path: Path, text: str) -> None:
    """Writes ``text`` directly to ``path``; for :func:`write_together`."""
    path.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_writable(folder: Path) -> None:
    """Checks, before any long computation, that files can be written in a folder, made or not.

    Raises:
        OutputError: files cannot be written there.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise OutputError(
            f"cannot write in {folder}: {nearest} is a file; choose another folder", got=folder
        )
    try:
        with tempfile.TemporaryDirectory(prefix=".fxquant.", dir=nearest):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write in {folder}: {error.strerror} for {nearest}; choose another folder",
            got=folder,
        ) from error
