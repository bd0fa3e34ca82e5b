"""Arguments of the command line: each has a help text."""

from __future__ import annotations

import argparse

import pytest

from fxquant.cli.arguments import build_parser


def commands() -> dict[str, argparse.ArgumentParser]:
    (choices,) = (
        action.choices
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return choices


@pytest.mark.parametrize("name", commands())
def test_every_argument_is_explained(name: str) -> None:
    arguments = commands()[name]._actions
    assert [action.dest for action in arguments if not action.help] == []


def test_doctor_says_what_its_images_and_seed_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["doctor", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--images N number of images of --data to run the file on (8)" in text
    assert "--seed N seed that chooses the images of --data (0)" in text
