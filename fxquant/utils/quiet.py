"""Suppression of output of libraries: of torch while it traces, of C code that prints on stdout."""

from __future__ import annotations

import ctypes
import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress

# File descriptor of the process's stdout, to which C code prints whatever ``sys.stdout`` is.
_STDOUT = 1
# One thread at a time: otherwise the second would save, and later restore, the first's redirection.
_STDOUT_LOCK = threading.RLock()


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses warnings, logging and stderr inside the ``with`` block.

    Failures inside the block are explained by our own errors.
    """
    disabled_before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled_before)


@contextmanager
def quiet_c_stdout() -> Iterator[None]:
    """Discards what C code prints on stdout inside the ``with`` block.

    The redirection holds for the whole process: text that another thread prints at the same time is
    discarded as well. A second thread waits until the first has left its block.
    """
    with _STDOUT_LOCK, ExitStack() as stack:
        with suppress(OSError):  # a closed stdout needs no redirection
            _discard_stdout(stack)
        yield


def _discard_stdout(stack: ExitStack) -> None:
    """Redirects stdout to the null device until the stack unwinds."""
    saved = os.dup(_STDOUT)
    stack.callback(os.close, saved)
    _flush_python_stdout()
    _flush_c_buffers()
    with open(os.devnull, "wb") as sink:
        os.dup2(sink.fileno(), _STDOUT)
    stack.callback(os.dup2, saved, _STDOUT)
    stack.callback(_flush_c_buffers)


def _flush_python_stdout() -> None:
    with suppress(AttributeError, OSError, ValueError):  # stdout may be None, broken or closed
        sys.stdout.flush()


def _flush_c_buffers() -> None:
    ctypes.CDLL("ucrtbase" if os.name == "nt" else None).fflush(None)
