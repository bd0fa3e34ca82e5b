"""The logger ``fxquant``."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from fxquant.cli import main
from fxquant.mixed_precision.sensitivity.loss_cache import LossCache
from fxquant.utils.log import LOGGER, logged


def test_nothing_is_shown_unless_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    assert any(isinstance(handler, logging.NullHandler) for handler in LOGGER.handlers)
    with logged("capture"):
        pass
    assert capfd.readouterr() == ("", "")


def test_a_step_and_its_seconds(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "fxquant"), logged("capture"):
        assert caplog.messages == ["capture begins"]
    assert caplog.messages[1].startswith("capture took ")
    assert [record.levelname for record in caplog.records] == ["DEBUG", "INFO"]


def test_losses_that_are_not_measured_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "fxquant"):
        for expected in (0, 1):
            cache = LossCache(tmp_path, "print", {})
            assert f"{expected} measured losses read from {tmp_path}" in caplog.text
            cache.put(("fc1", (4,)), 0.5)
            cache.close()
    assert "loss of fc1 at (4,) bits: 0.5" in caplog.messages


def test_the_command_line_shows_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[bool] = []
    monkeypatch.setattr("fxquant.cli.show_log", lambda: shown.append(True))
    assert main(["policies", "w8a8", "--verbose"]) == 0 and main(["policies", "w8a8"]) == 0
    assert shown == [True]
