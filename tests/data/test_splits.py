"""Splits and slices: the same rows as the library datasets takes."""

from typing import Any

import pytest
from datasets import ReadInstruction
from hypothesis import given
from hypothesis import strategies as st

from fgpt.data.splits import parse_split

BOUND = st.none() | st.integers(-60, 60)


@given(BOUND, BOUND, st.booleans(), st.integers(0, 50))
def test_slices_take_the_rows_that_datasets_takes(start: int | None, stop: int | None, percent: bool, num_rows: int):
    unit = "%" * percent
    text = f"train[{'' if start is None else f'{start}{unit}'}:{'' if stop is None else f'{stop}{unit}'}]"
    (part,) = parse_split(text)
    rows = list(range(num_rows))
    try:
        theirs: Any = ReadInstruction.from_spec(text).to_absolute({"train": num_rows})[0]
        expected = rows[theirs.from_ : theirs.to]
    except ValueError:  # it refuses bounds beyond the rows where they count from the end
        return
    assert list(part.select(lambda: iter(rows))) == expected


@pytest.mark.parametrize("text", ["train[:5]", "train[-5:]", "train", "train[10%:30%]", ":5"])
def test_a_slice_alone_is_one_of_the_default_split(text: str):
    (part,) = parse_split(text)
    assert part.name == (None if text.startswith(":") else "train")
