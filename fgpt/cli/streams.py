"""The standard streams of a command, whatever is at their other ends: a terminal that hangs up, a pipe that is closed,
an encoding that has not every character.
"""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def robust() -> Iterator[None]:
    """While it lasts, what an encoding does not have is written as a question mark, input that is not in its encoding
    is read with a mark in its place, and writing to a stderr that is gone does nothing: what is told there is for
    somebody to look at, and no reason for a training to end. A closed stdout is an error as ever.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):  # what is left in a buffer may have nowhere to go
                stream.reconfigure(errors="replace")
    stderr = sys.stderr
    sys.stderr = _Lasting(stderr) if stderr is not None else open(os.devnull, "w")  # noqa: SIM115
    try:
        yield
    finally:
        sys.stderr = stderr


class _Lasting:
    """A stream whose writing never fails. Everything else is the stream's own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as err:
            self._drop(err)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as err:
            self._drop(err)

    def _drop(self, err: OSError) -> None:
        if err.errno in (errno.EPIPE, errno.EIO):  # a full disk may have room again
            drop(self._stream)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def drop(stream: Any) -> None:
    """Lead a stream that cannot be written any more to nowhere, with what is still in its buffer; else Python would try
    to write that at its end, and complain.
    """
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
