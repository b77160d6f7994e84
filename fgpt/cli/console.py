"""Where commands print: progress, messages and tables of results on stderr, answers alone on stdout. Nothing is parsed
as markup, since a label, a path or a prompt may have square brackets; bold text is a `Text` with a style.

console          progress and messages, which --quiet drops
result_console   tables of results, which --quiet leaves
answers          what a command is asked for: text, or with --json one document
"""

import logging
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
from rich.table import Column
from rich.text import Text

T = TypeVar("T")


class Answers(Console):
    """For stdout. If its reader closes it, as `head` does, the command ends."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


console = Console(stderr=True, highlight=False, markup=False, emoji=False)
result_console = Console(stderr=True, highlight=False, markup=False, emoji=False)
answers = Answers(highlight=False, markup=False, emoji=False)
logger = logging.getLogger(__name__)


@contextmanager
def quiet() -> Iterator[None]:
    """No messages and no tables of results are printed: for what is computed again."""
    before = console.quiet, result_console.quiet
    console.quiet = result_console.quiet = True
    try:
        yield
    finally:
        console.quiet, result_console.quiet = before


def announce(name: str, *sentences: str) -> None:
    """Print what will be trained, in a paragraph that starts with the name of the run."""
    console.print(Text.assemble((name, "bold"), ": ", "; ".join(sentences)))


# ------------------------------------------------------------------------------------------------------------ progress

FIRST_LINE_AFTER = 10.0
"""Seconds of work before its first line if there is no terminal to show a bar in."""
LINE_INTERVAL = 60.0
"""Seconds from one such line to the next."""
WIDE = 100
"""Columns of a terminal in which a bar leaves enough room for the rest."""

_shown_tasks: list[str] = []
"""The work that is shown: work within it shows nothing of its own."""


@contextmanager
def show_progress(description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show that work goes on. Yields a function that takes how much of `total` was done since its last call.

    In a terminal it is a bar, or a spinner without a total, which disappears when the work is done; elsewhere it is a
    line after ten seconds and one each minute. Within other work that is shown it is nothing.
    """
    if _shown_tasks:
        yield lambda n: None
        return
    show, start = _bar if console.is_terminal else _lines, time.perf_counter()
    with exclusive_progress(description), show(description, total) as advance:
        yield advance
    logger.debug("%s: %.2f s", description, time.perf_counter() - start)


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """The items, while `show_progress` shows how many of `total` were taken; None takes their number if known."""
    if total is None and isinstance(items, Collection):
        total = len(items)
    with show_progress(description, total) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def exclusive_progress(description: str) -> Iterator[None]:
    """Show no other progress within it."""
    _shown_tasks.append(description)
    try:
        yield
    finally:
        _shown_tasks.remove(description)


@contextmanager
def _bar(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    is_wide = console.width >= WIDE
    words = None if is_wide else Column(ratio=1, no_wrap=True, overflow="ellipsis")  # they are cut, and no figure is
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", markup=False, table_column=words),
        TimeElapsedColumn(),
    ]
    if total is None:
        columns.insert(0, SpinnerColumn())
    else:
        columns[1:1] = [*([BarColumn(40)] if is_wide else []), MofNCompleteColumn()]
        columns += [TextColumn("eta"), TimeRemainingColumn()]
    with Progress(*columns, console=console, transient=True, expand=not is_wide) as bar:
        task = bar.add_task(description, total=total)
        yield lambda n: bar.advance(task, n)


def training_columns(width: int) -> list[ProgressColumn]:
    """The progress line of a training in a terminal of `width` columns: step, metrics, elapsed time and ETA.

    If it is narrow there is no bar, and the metrics are cut, of which the first ones matter most.
    """
    metrics = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    columns: list[ProgressColumn] = [
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False, table_column=metrics),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    ]
    if width >= WIDE:
        columns[:0] = [TextColumn("{task.description}", markup=False), BarColumn(bar_width=20)]
    return columns


@contextmanager
def _lines(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    start, done, ended = time.monotonic(), 0, threading.Event()

    def advance(n: int) -> None:
        nonlocal done
        done += n

    def print_lines() -> None:
        wait = FIRST_LINE_AFTER
        while not ended.wait(wait):
            console.print(_progress_line(description, done, total, time.monotonic() - start), soft_wrap=True)
            wait = LINE_INTERVAL

    thread = threading.Thread(target=print_lines, daemon=True)
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
