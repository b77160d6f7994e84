"""The error for bad input, and how its one line shows a value."""

from typing import Any, get_args

MAX_CHARS = 80
"""Characters shown of a value or a name."""


class InputError(ValueError):
    """Bad input. The message is one line: what was expected, what came, and how to fix it.

    A command line prints the message alone and exits with a non-zero code. Any other exception is a bug and keeps its
    traceback.

    `field` is the option to change, which the message names in backticks, as in "raise `max_seq_len`": a command line
    writes it as its own option.

    >>> import fgpt
    >>> try:
    ...     fgpt.SamplingParams(top_k=0)
    ... except fgpt.InputError as err:
    ...     print(err)
    top_k is 0: expected a number of tokens, 1 or more
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class CompileWarning(UserWarning):
    """What was to be compiled, or recorded as a CUDA graph, runs as it is: as right, and slower. The message is one
    line that says why.
    """


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raises InputError if `value` is none of the words or numbers of the type `choices`, a Literal.

    >>> from typing import Literal
    >>> try:
    ...     check_choice("norm_type", "rmss", Literal["layer", "rms"])
    ... except InputError as err:
    ...     print(err)
    norm_type is 'rmss': expected one of layer, rms
    """
    if value not in get_args(choices):
        raise InputError(f"{name} is {short_repr(value)}: expected one of {', '.join(map(str, get_args(choices)))}")


def short_repr(value: Any) -> str:
    """`repr(value)`, shortened if it is long."""
    try:
        text = repr(value)
    except RecursionError:
        return "something nested deeply"
    return text if len(text) <= MAX_CHARS else f"{text[: MAX_CHARS - 3]}..."


def printable(text: str) -> str:
    """A name from a file: as it is, or as its shortened `repr` if it is long or would break the line."""
    return text if text.isprintable() and len(text) <= MAX_CHARS else short_repr(text)


def one_line(message: object) -> str:
    """A message of another library, which may quote a file, in printable characters with single spaces."""
    text = "".join(c if c.isprintable() else " " for c in str(message))
    return " ".join(text.split())
