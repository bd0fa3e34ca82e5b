"""Writing whole: what stands where the file goes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from fxquant.errors import OutputError
from fxquant.utils.files import write_text
from tests.helpers.refusals import refused


@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_is_not_replaced_by_a_file(tmp_path: Path, linked: bool) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    with refused(OutputError, r"cannot write \S+pipe: \S+pipe is a pipe or device", got=pipe):
        write_text(link if linked else pipe, "text")
    assert stat.S_ISFIFO(pipe.stat().st_mode) and link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]


@pytest.mark.parametrize("there", [False, True], ids=["dangling", "to a file"])
def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path: Path, there: bool) -> None:
    real, link = tmp_path / "real" / "v1.txt", tmp_path / "current.txt"
    real.parent.mkdir()
    if there:
        real.write_text("old")
    link.symlink_to(Path("real") / "v1.txt")
    write_text(link, "new")
    assert link.is_symlink() and real.read_text() == "new"
    assert [path.name for path in real.parent.iterdir()] == ["v1.txt"]
