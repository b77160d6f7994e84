"""Batches that a thread prepares while the device computes."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

T = TypeVar("T")

AHEAD = 2
"""Items that wait at most."""


@contextlib.contextmanager
def in_background(items: Iterator[T]) -> Iterator[Iterator[T]]:
    """Yields the same items in the same order, taken from `items` by a thread, a few ahead.

    What `items` raises is raised where its item is asked for. The thread ends with the block; until then it waits.
    It makes no call to CUDA: one from a second thread would spoil a graph that the first one captures.
    """
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(AHEAD)
    ended, stopped = StopIteration(), threading.Event()

    def put(item: Any, error: BaseException | None) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((item, error), timeout=0.05)
                return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item, None):
                    return
            put(None, ended)
        except BaseException as error:
            put(None, error)

    def take() -> Iterator[T]:
        while True:
            item, error = ready.get()
            if error is ended:
                return
            if error is not None:
                raise error
            yield item

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        stopped.set()
        thread.join()
