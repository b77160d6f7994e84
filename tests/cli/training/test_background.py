"""Batches that a thread prepares: the same ones in the same order, and no thread that is left."""

import threading
import time
from collections.abc import Iterator

import pytest

from fgpt.cli.training.background import AHEAD, in_background


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "batches"]


def test_the_same_items_in_the_same_order():
    with in_background(iter(range(50))) as items:
        assert list(items) == list(range(50))
    assert threads() == []


def test_a_few_are_prepared_ahead():
    taken: list[int] = []

    def source() -> Iterator[int]:
        for i in range(100):
            taken.append(i)
            yield i

    with in_background(source()) as items:
        assert next(items) == 0
        for _ in range(400):
            if len(taken) == AHEAD + 2:  # those that wait, and the one in the thread's hand
                break
            time.sleep(0.005)
        time.sleep(0.1)
        assert len(taken) == AHEAD + 2
    assert threads() == []


def test_an_error_is_raised_where_its_item_is_asked_for():
    def source() -> Iterator[int]:
        yield 1
        raise ValueError("the second")

    with in_background(source()) as items:
        assert next(items) == 1
        with pytest.raises(ValueError, match="the second"):
            next(items)
    assert threads() == []


def test_the_thread_ends_with_its_block():
    def endless() -> Iterator[int]:
        while True:
            yield 0

    def interrupt() -> None:
        with in_background(endless()) as items:
            next(items)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert threads() == []
