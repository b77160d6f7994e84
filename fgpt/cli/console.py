"""Where the commands speak: stderr, so that answers alone go to stdout. Nothing that is printed is markup, in tables
neither: a label, a path or a prompt may hold square brackets. What is to be bold is a `Text` with a style.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")


class Answers(Console):
    """For stdout. Whoever reads it may close it, as `head` does: the command then ends."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


console = Console(stderr=True, highlight=False, markup=False, emoji=False)
answers = Answers(highlight=False, markup=False, emoji=False)


def announce(name: str, *sentences: str) -> None:
    """What is about to be trained, in a paragraph that begins with the run's name."""
    console.print(Text.assemble((name, "bold"), ": ", "; ".join(sentences)))


# ---------------------------------------------------------------------------------------------------- how far it is

FIRST_LINE_AFTER = 10.0
"""Seconds that work takes before a line tells of it, where there is no terminal to show a bar in."""
LINE_INTERVAL = 60.0
"""Seconds from one such line to the next."""

_shown_tasks: list[str] = []
"""The work that is shown: what is part of it shows nothing of its own."""


@contextmanager
def show_progress(description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show that work is under way. What is yielded takes how much of `total` was done since it was last called.

    In a terminal it is a bar, or a spinner without a total, which is gone when the work is done; elsewhere a line after
    ten seconds, and one each minute. Within other work that is shown, nothing.
    """
    if _shown_tasks:
        yield lambda n: None
        return
    show = _bar if console.is_terminal else _lines
    with exclusive_progress(description), show(description, total) as advance:
        yield advance


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """The items, and how many of `total` were taken, or of as many as there are; see `working`."""
    if total is None and isinstance(items, Collection):
        total = len(items)
    with show_progress(description, total) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def exclusive_progress(description: str) -> Iterator[None]:
    """Within it no other work is shown: this one shows by itself how far it is."""
    _shown_tasks.append(description)
    try:
        yield
    finally:
        _shown_tasks.remove(description)


@contextmanager
def _bar(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False), TimeElapsedColumn()]
    if total is None:
        columns.insert(0, SpinnerColumn())
    else:
        columns[1:1] = [BarColumn(), MofNCompleteColumn()]
        columns += [TextColumn("eta"), TimeRemainingColumn()]
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda n: bar.advance(task, n)


@contextmanager
def _lines(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    began, done, ended = time.monotonic(), 0, threading.Event()

    def advance(n: int) -> None:
        nonlocal done
        done += n

    def speak() -> None:
        wait = FIRST_LINE_AFTER
        while not ended.wait(wait):
            console.print(_progress_line(description, done, total, time.monotonic() - began), soft_wrap=True)
            wait = LINE_INTERVAL

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield advance
    finally:
        ended.set()
        thread.join()


def _progress_line(description: str, done: int, total: int | None, seconds: float) -> str:
    if total is None:
        return f"{description}: {seconds:.0f} s so far .."
    left = f", eta {seconds / done * (total - done):.0f} s" if done else ""
    return f"{description}: {done:,} of {total:,} in {seconds:.0f} s{left}"
