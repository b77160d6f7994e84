"""Rungs and rules by hand, and the memory of members by numbers that are given."""

import mmap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgpt.cli.sweep import memory
from fgpt.cli.sweep.pruners import below_median, halving_losers, halving_rungs, median_rungs


@given(st.integers(1, 200), st.integers(1, 500), st.integers(2, 5))
def test_halving_ends_with_one_member_by_a_quarter_of_the_training(members: int, steps: int, factor: int):
    rungs = halving_rungs(members, steps, factor)
    assert rungs == sorted(set(rungs))
    assert all(0 < rung < steps for rung in rungs)
    left = list(map(str, range(members)))
    for _ in rungs:
        losers = halving_losers({name: float(name) for name in left}, factor)
        left = [name for name in left if name not in losers]
        assert left[0] == "0"
    if rungs and rungs[-1] * factor < steps and len(rungs) == len(halving_rungs(members, 10**6, factor)):
        assert left == ["0"]


def test_halving_by_hand():
    assert halving_rungs(8, 1600, 2) == [100, 200, 400]
    assert halving_rungs(8, 1600, 2, min_steps=50) == [50, 100, 200]
    assert halving_rungs(9, 1600, 3) == [134, 402]
    assert halving_rungs(1, 100, 2) == []
    assert halving_losers({"a": 3.0, "b": 1.0, "c": float("nan"), "d": 1.0, "e": 2.0}, 2) == ["a", "c"]


def test_the_median_by_hand():
    losses = {"a": 3.0, "b": 1.0, "c": 2.0}
    assert below_median(losses, {"a": [4.0, 3.0], "b": [5.0, 1.0], "c": [2.5, 2.0]}) == ["a"]
    assert below_median(losses, {"a": [1.5, 3.0], "b": [5.0, 1.0], "c": [2.5, 2.0]}) == []  # it was better once
    assert below_median({"a": float("nan"), "b": 1.0, "c": 2.0}, {"a": [float("nan")], "b": [1.0], "c": [2.0]}) == ["a"]
    assert median_rungs(30, min_steps=25) == [25, 28]


@pytest.mark.parametrize(
    ("free", "peaks", "expected"),
    [
        (1000, (100, 150), 15),  # 100 + 14 · 50 = 800, which is four fifths of 1,000
        (1000, (100, 100), 20),
        (110, (100, 150), 1),
        (10_000, (100, 150), 20),
    ],
)
def test_members_that_fit(free: int, peaks: tuple[int, int], expected: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    monkeypatch.setattr(memory, "_in_use", lambda device: 7)
    counts: list[int] = []

    def peak(take_step: object, device: object) -> int:
        take_step()  # pyright: ignore
        return 7 + peaks[len(counts) - 1]

    monkeypatch.setattr(memory, "_peak", peak)
    assert memory.members_that_fit(20, counts.append, memory.torch.device("cpu")) == (expected if free > 110 else 1)
    assert counts == [1, 2]


def test_one_member_that_does_not_fit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 50)
    monkeypatch.setattr(memory, "_in_use", lambda device: 0)
    monkeypatch.setattr(memory, "_peak", lambda take_step, device: 100)
    with pytest.raises(memory.InputError, match="one member takes"):
        memory.members_that_fit(2, lambda n: None, memory.torch.device("cpu"))


def test_what_linux_says_of_memory():
    """More is in use in a step than before it, and what is free is a number of bytes."""
    device = memory.torch.device("cpu")

    def use_new_pages() -> None:
        with mmap.mmap(-1, 1 << 27) as pages:  # a tensor might lie in pages that the process has freed and kept
            pages.write(b"1" * (1 << 27))

    before = memory._in_use(device)
    peak = memory._peak(use_new_pages, device)
    assert before + (1 << 26) < peak < before + (1 << 29)
    assert memory.free_memory(device) > 1 << 26
