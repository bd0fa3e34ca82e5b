"""Progress on stderr: a bar on a terminal, plain lines elsewhere, nothing under two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
Label = str | Callable[[], str]

QUIET_SECONDS = 2.0
LINE_SECONDS = 5.0


def track(
    items: Iterable[T], *, label: Label, total: int = 0, done: int = 0, enabled: bool = True
) -> Iterator[T]:
    """Yields ``items`` and shows progress on stderr.

    Args:
        items: items to yield.
        label: name of the step, or a function that returns it, called for each item.
        total: number of items including ``done``; 0 if unknown.
        done: number of items that were done before.
        enabled: False shows nothing.
    """
    if not enabled:
        yield from items
        return
    console = Console(file=sys.stderr)
    shown_as = _bar if console.is_terminal else _lines
    yield from shown_as(items, label if callable(label) else lambda: label, total, done, console)


def _bar(
    items: Iterable[T], label: Callable[[], str], total: int, done: int, console: Console
) -> Iterator[T]:
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    start = time.monotonic()
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(label(), total=total or None, completed=done)
    started = False
    try:
        for item in items:
            if not started and time.monotonic() - start > QUIET_SECONDS:
                bar.start()
                started = True
            yield item
            bar.update(task, advance=1, description=label())
    finally:
        bar.stop()


def _lines(
    items: Iterable[T], label: Callable[[], str], total: int, done: int, console: Console
) -> Iterator[T]:
    start = time.monotonic()
    due = start + QUIET_SECONDS
    for number, item in enumerate(items, done):
        now = time.monotonic()
        if now > due:
            of = f"/{total}" if total else ""
            print(f"{label()}: {number}{of}, {now - start:.0f} s", file=sys.stderr, flush=True)
            due = now + LINE_SECONDS
        yield item


@contextmanager
def working(label: str, *, enabled: bool = True) -> Iterator[None]:
    """Shows on stderr that a step without countable items is running.

    Args:
        label: name of the step.
        enabled: False shows nothing.
    """
    if not enabled:
        yield
        return
    console = Console(file=sys.stderr)
    if console.is_terminal:
        with console.status(label):
            yield
        return
    start = time.monotonic()
    yield
    if time.monotonic() - start > QUIET_SECONDS:
        print(f"{label}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
