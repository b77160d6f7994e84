"""Examples in Arrow's columns are the examples of a list, and rows come back from JSON."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fgpt.cli.training.hashes import fast_hash
from fgpt.data import json_lists
from fgpt.data.conversations import Message
from fgpt.data.example_store import StoredExamples, StoredRows, example_batch, row_batch
from fgpt.data.examples import Example, Span, count_loss_tokens, example_lengths, split_text, truncate, with_answer
from fgpt.data.finqa import FinQA
from fgpt.data.json_lists import NotAListError, list_items
from fgpt.data.packing import usable_indices
from fgpt.data.prompt_templates import InstructionRow, Turn
from fgpt.errors import InputError

texts = st.text(max_size=10)
messages = st.builds(Message, st.sampled_from(["user", "assistant"]), texts, st.floats(0, 2), st.booleans())
turns = st.builds(Turn, texts, texts, texts, st.lists(messages, max_size=3).map(tuple), st.floats(0, 2), texts)
rows = st.builds(InstructionRow, texts, texts, texts) | turns | st.builds(FinQA, *[texts] * 6)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    tokens = draw(st.lists(st.integers(0, 2**31 - 1), max_size=12))
    edges = sorted(draw(st.lists(st.integers(0, len(tokens)), max_size=6, unique=True)))
    weights = st.sampled_from([0.1, 0.5, 1.0])
    if tokens and draw(st.booleans()):
        return Example(tuple(tokens), (Span(0, len(tokens), draw(weights)),))  # raw text
    spans = tuple(Span(a, b, draw(weights)) for a, b in zip(edges[::2], edges[1::2], strict=False))
    return Example(tuple(tokens), spans)


@given(st.data())
def test_a_store_is_its_list(data: st.DataObject):
    batches = data.draw(st.lists(st.lists(examples(), max_size=5), max_size=4))
    flat = [example for batch in batches for example in batch]
    limit = data.draw(st.integers(2, 13))
    store = StoredExamples.from_batches([example_batch(batch, range(len(batch))) for batch in batches])
    cut, num_cut = store.truncate(limit)
    full, flat_cut = flat, [truncate(example, limit) for example in flat]
    assert num_cut == sum(a is not b for a, b in zip(full, flat_cut, strict=True))
    chosen = np.array(data.draw(st.lists(st.integers(0, len(flat) - 1), max_size=6)) if flat else [], np.int64)
    split, owners = store.split_texts(limit)
    parts = [split_text(example, limit) for example in flat]
    assert owners.tolist() == [i for i, of_example in enumerate(parts) for _ in of_example]
    flat_split = [part for of_example in parts for part in of_example]
    cases = [(store, flat), (cut, flat_cut), (cut.take(chosen), [flat_cut[i] for i in chosen.tolist()])]
    cases += [(split, flat_split), (split.truncate(limit)[0], [truncate(part, limit) for part in flat_split])]
    for stored, listed in cases:
        assert [stored[i] for i in range(len(stored))] == listed
        assert example_lengths(stored).tolist() == example_lengths(listed).tolist()
        assert with_answer(stored).tolist() == with_answer(listed).tolist()
        assert count_loss_tokens(stored) == count_loss_tokens(listed)
        assert fast_hash(stored) == fast_hash(listed)
        for drop in (False, True):
            assert _usable(stored, limit, drop) == _usable(listed, limit, drop)
    assert store.rows.tolist() == [i for batch in batches for i in range(len(batch))]


def _usable(found: StoredExamples | list[Example], limit: int, drop: bool) -> object:
    try:
        indices, dropped = usable_indices(found, limit, drop)
    except InputError as err:
        return str(err)
    return indices.tolist(), dropped


@given(st.lists(st.lists(rows, max_size=4), max_size=3))
def test_rows_come_back(batches: list[list[InstructionRow]]):
    stored = StoredRows([row_batch(batch) for batch in batches])
    assert list(stored) == [row for batch in batches for row in batch]
    assert [type(row) for row in stored] == [type(row) for batch in batches for row in batch]
    assert stored[1:] == list(stored)[1:]


def test_every_class_of_rows_can_be_stored():
    from fgpt.data.row_json import CLASSES

    found = [InstructionRow]
    for kind in found:
        found += kind.__subclasses__()
    assert {kind for kind in found if kind.__module__.startswith("fgpt.data.")} <= set(CLASSES.values())


# --------------------------------------------------------------------------------------------------------- JSON lists

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(values, max_size=6), st.integers(1, 9), st.sampled_from([None, 1]), st.booleans())
@example([0.0], 2, None, False)
@example([1.5e300, -2e-9], 1, None, False)
def test_the_items_of_a_list(items: list[object], chunk: int, indent: int | None, ascii_only: bool):
    text = json.dumps(items, indent=indent, ensure_ascii=ascii_only)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lists, "CHUNK", chunk)
        assert list(list_items(io.StringIO(f" {text}\n"))) == items
        for broken in (text[:-1], f"{text} 1", text[1:], "", "{}", f"[1 2{text[1:]}", "[1,]", "[,1]"):
            if not _is_list(broken):
                with pytest.raises(NotAListError):
                    list(list_items(io.StringIO(broken)))


def _is_list(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list)
    except ValueError:
        return False


@pytest.mark.slow
def test_a_list_is_not_held(tmp_path: Path):
    import subprocess

    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"instruction": "a" * 50, "input": "", "output": "b" * 50}] * 200_000))
    code = (
        "import resource, sys; from pathlib import Path; from fgpt.data.records import read_records;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak();"
        f"n = sum(1 for _ in read_records(Path({str(path)!r}))); print(n, peak() - before)"
    )
    count, kilobytes = map(int, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert count == 200_000
    assert kilobytes < 20_000  # the file has 27 MB, and its rows take 100
