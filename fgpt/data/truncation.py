"""Texts without their middle."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def truncate_middle(items: Sequence[T], count: int, ellipsis: Sequence[T]) -> list[T]:
    """`count` of the items, half from the beginning and half from the end, with `ellipsis` in place of the middle.

    >>> "".join(truncate_middle("abcdefgh", 5, ".."))
    'abc..gh'
    """
    tail = count // 2
    return [*items[: count - tail], *ellipsis, *items[len(items) - tail :]]
