"""The one error a user can mend, and how its one line shows what was found."""

from typing import Any

LONGEST = 80
"""Characters shown of a value or a name."""


class InputError(ValueError):
    """Bad input. The message is one line: what was expected, what came, and how to mend it.

    Command lines print it alone and exit with a non-zero code; any other exception is a defect of ours and keeps its
    traceback.

    `field` is the option to change, which the message names in backticks, as in "raise `max_seq_len`": a command line
    writes it as its own option.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


def shown(value: Any) -> str:
    """What a file says, as Python writes it: of something long its beginning."""
    try:
        text = repr(value)
    except RecursionError:
        return "something nested deeply"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def printable(text: str) -> str:
    """A name that a file gives: as it is, or where it is long or would break the line, as `shown` shows it."""
    return text if text.isprintable() and len(text) <= LONGEST else shown(text)


def one_line(said: object) -> str:
    """What another library says, which may quote a file, in printable characters with single spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(said)).split())
