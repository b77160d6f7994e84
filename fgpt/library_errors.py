"""Calls into libraries written in Rust, whose panics are not an `Exception` in Python."""

from collections.abc import Callable
from typing import TypeVar

from fgpt.errors import InputError, one_line

T = TypeVar("T")


def call(what: str, function: Callable[[], T]) -> T:
    """`function()`. Raises InputError, which begins with `what`, if the library raises or panics."""
    try:
        return function()
    except InputError:
        raise
    except BaseException as err:
        if isinstance(err, Exception) or type(err).__name__ == "PanicException":
            raise InputError(f"{what}: {one_line(err)[:300]}") from None
        raise
