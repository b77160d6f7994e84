"""Standard streams that survive a terminal that hangs up, a closed pipe, and an encoding that lacks characters."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def robust_streams() -> Iterator[None]:
    """Within it, writing replaces characters that an encoding lacks, reading replaces invalid bytes, and writing to a
    closed stderr does nothing, so that a training goes on if nobody reads its messages. A closed stdout is an error as
    usual.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):  # a buffer may be flushed to a closed pipe
                stream.reconfigure(errors="replace")
    stderr = sys.stderr
    sys.stderr = _UnfailingStream(stderr) if stderr is not None else open(os.devnull, "w")  # noqa: SIM115
    try:
        yield
    finally:
        sys.stderr = stderr


class _UnfailingStream:
    """A stream whose writes never fail; anything else is the wrapped stream's."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as err:
            self._redirect_if_closed(err)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as err:
            self._redirect_if_closed(err)

    def _redirect_if_closed(self, err: OSError) -> None:
        if err.errno in (errno.EPIPE, errno.EIO):  # not for a full disk, which may get space again
            redirect_to_null(self._stream)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def redirect_to_null(stream: Any) -> None:
    """Redirect a closed stream to the null device, or Python would complain when it flushes its buffer at exit."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
