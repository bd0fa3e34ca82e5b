"""Output of libraries: what C code prints on stdout is discarded, and nothing else is."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from fxquant.utils.quiet import quiet_c_stdout

LIBC = ctypes.CDLL(None)


def print_in_c(text: str) -> None:
    LIBC.printf(b"%s", text.encode())


def test_what_c_prints_is_discarded_inside_the_block_alone(
    capfd: pytest.CaptureFixture[str],
) -> None:
    print("python before")
    print_in_c("c before\n")
    with quiet_c_stdout():
        print_in_c("c inside, in a buffer")
        os.write(1, b"inside, without a buffer")
    print_in_c("c after\n")
    LIBC.fflush(None)
    print("python after")
    printed = capfd.readouterr().out.splitlines()
    assert sorted(printed) == ["c after", "c before", "python after", "python before"]


def test_stdout_comes_back_after_an_error_and_no_descriptor_is_leaked(
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ZeroDivisionError), quiet_c_stdout():
        print_in_c("inside")
        raise ZeroDivisionError
    assert len(os.listdir("/proc/self/fd")) == before
    os.write(1, b"after")
    assert capfd.readouterr().out == "after"


def test_blocks_of_one_thread_nest(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet_c_stdout():
        with quiet_c_stdout():
            print_in_c("inner")
        print_in_c("outer")
    os.write(1, b"after")
    assert capfd.readouterr().out == "after"


def test_threads_leave_stdout_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    start = threading.Barrier(8)

    def print_quietly(thread: int) -> None:
        start.wait()
        for _ in range(20):
            with quiet_c_stdout():
                print_in_c(f"thread {thread}\n")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(print_quietly, range(8)))
    os.write(1, b"after")
    assert capfd.readouterr().out == "after"


@pytest.mark.parametrize("stdout", [None, object()])
def test_python_may_have_no_stdout(
    stdout: object, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", stdout)
    with quiet_c_stdout():
        print_in_c("inside")
    monkeypatch.undo()
    assert capfd.readouterr().out == ""


def test_a_closed_stdout_stays_closed() -> None:
    script = (
        "import os, fxquant.utils.quiet as module\n"
        "os.close(1)\n"
        "with module.quiet_c_stdout(): pass\n"
        "try: os.fstat(1)\n"
        "except OSError: raise SystemExit(7)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 7
