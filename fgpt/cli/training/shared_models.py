"""Models that several trainings of one process read, each in memory once."""

import contextlib
from collections.abc import Callable, Hashable, Iterator

from fgpt.model import GPT

_shared: list[dict[Hashable, GPT]] = []


@contextlib.contextmanager
def share_models() -> Iterator[None]:
    """Within it, `load_once` loads a model once."""
    _shared.append({})
    try:
        yield
    finally:
        _shared.pop()


def load_once(what: Hashable, load: Callable[[], GPT]) -> GPT:
    """`load()`, or within `share_models` what it returned before for an equal `what`."""
    if not _shared:
        return load()
    if what not in _shared[-1]:
        _shared[-1][what] = load()
    return _shared[-1][what]
