"""Ctrl-C, SIGTERM and SIGHUP: the first one ends a command in order, a second one at once.

The second one is left to the kernel, so that it ends a step of minutes or a library that swallows exceptions too. Files
are written such that a kill at any moment leaves them intact.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from fgpt.cli.console import console

_active_handlers: list[Any] = []
"""The handlers of `on_first_signal` blocks, the innermost last."""

NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextlib.contextmanager
def on_first_signal(act: Callable[[], None]) -> Iterator[None]:
    """Within it the first signal calls `act`, and a second one of any kind ends the process. A signal that is ignored,
    as SIGHUP is under nohup, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    handlers = {number: signal.getsignal(number) for number in NUMBERS}
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    received: list[int] = []

    def first(number: int, _: Any) -> None:
        received.append(number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        with contextlib.suppress(RuntimeError):  # if it came in the middle of printing
            console.show_cursor(True)  # hidden by a bar; after a second signal nothing could show it
        act()

    for number in before:
        signal.signal(number, first)
    _active_handlers.append(first)
    try:
        yield
    finally:
        _active_handlers.remove(first)
        if not received or not _active_handlers:  # else a second one ends the process until the outermost block ends
            for number, handler in before.items():
                signal.signal(number, handler)


def interrupt() -> None:
    """What Ctrl-C does in Python."""
    raise KeyboardInterrupt
