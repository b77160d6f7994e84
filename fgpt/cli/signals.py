"""Ctrl-C, SIGTERM and SIGHUP: the first ends a command in order, a second one at once.

Whatever the first one met, a step of minutes or a library that swallows exceptions, a second is left to the kernel:
files are written so that a kill at any moment leaves them whole.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from fgpt.cli.console import console

_active_handlers: list[Any] = []
"""The handlers of all that lasts, the innermost last."""

NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextlib.contextmanager
def on_first_signal(act: Callable[[], None]) -> Iterator[None]:
    """While it lasts, the first signal calls `act`, and a second one of any kind ends the process. One that is ignored,
    as SIGHUP is under nohup, stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    handlers = {number: signal.getsignal(number) for number in NUMBERS}
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    received: list[int] = []

    def first(number: int, _: Any) -> None:
        received.append(number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        with contextlib.suppress(RuntimeError):  # where it came in the middle of another line
            console.show_cursor(True)  # a bar has hidden it, and after a second signal nobody could bring it back
        act()

    for number in before:
        signal.signal(number, first)
    _active_handlers.append(first)
    try:
        yield
    finally:
        _active_handlers.remove(first)
        if (
            not received or not _active_handlers
        ):  # else a second one goes on to end the process, until all of this is left
            for number, handler in before.items():
                signal.signal(number, handler)


def interrupt() -> None:
    """What Ctrl-C does in Python."""
    raise KeyboardInterrupt
