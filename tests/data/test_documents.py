"""Rows of documents lose no token; WikiText and Tulu as the hub has them."""

import itertools
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from builders import SharedData

import fgpt
from fgpt.cli.tasks.pretraining import batches
from fgpt.cli.training import documents
from fgpt.data import hub_datasets, instruction_datasets, packing
from fgpt.data.conversations import Message
from fgpt.data.documents import articles, read
from fgpt.data.examples import Example, truncate
from fgpt.data.rows import ConversationRow
from fgpt.recipes import PretrainingRecipe


@pytest.mark.parametrize(("lengths", "seq"), [([5, 3, 9], 4), ([1], 7), ([40, 2], 6)])
def test_rows_lose_no_token(lengths: list[int], seq: int):
    """After `seq` epochs the stream ends with a row: each token was to be predicted as often as it came."""
    numbers = itertools.count(1)
    streams = [torch.tensor([next(numbers) for _ in range(n)], dtype=torch.int32) for n in lengths]
    epoch = sum(lengths) + len(lengths)
    stream = documents.rows(streams, 0, seq, fgpt.key(0))
    rows = [next(stream) for _ in range(epoch)]  # seq epochs of `epoch` tokens, in rows of seq
    assert Counter(t for row in rows for t in row[1:].tolist()) == Counter(
        {t: seq for x in streams for t in x.tolist()} | {0: seq * len(lengths)}
    )
    after = {b: a for x in streams for a, b in itertools.pairwise([0, *x.tolist()])}
    assert all(after.get(b, a) == a for row in rows for a, b in itertools.pairwise(row.tolist()))
    repeated = documents.rows(streams, 0, seq, fgpt.key(0))
    assert all(torch.equal(row, next(repeated)) for row in rows)


def test_micro_batches_are_rows_one_after_the_other():
    streams = [torch.arange(1, 200, dtype=torch.int32)]
    (one,) = next(batches(streams, 0, PretrainingRecipe(name="a", max_seq_len=5, micro_batch_size=6), fgpt.key(1)))
    three = next(
        batches(
            streams,
            0,
            PretrainingRecipe(name="a", max_seq_len=5, micro_batch_size=2, grad_accumulation_steps=3),
            fgpt.key(1),
        )
    )
    assert len(three) == 3
    assert torch.equal(torch.cat([batch.tokens for batch in three]), one.tokens)
    assert torch.equal(one.targets[:, :-1], one.tokens[:, 1:])
    assert bool(one.weights.all())


WIKI = " \n = One = \n \n Text = 3 . \n \n = = Part = = \n \n = = = Sub = = = \n \n \n = Two = \n \n More . \n \n"


def test_articles_of_wikitext_put_together_are_the_text(tmp_path: Path, shared_data: SharedData):
    assert articles(WIKI) == [WIKI[: WIKI.index(" \n = Two")], WIKI[WIKI.index(" \n = Two") :]]
    assert articles("plain = text = \n") == ["plain = text = \n"]
    real = (shared_data("wikitext-2") / "wiki.valid.raw").read_text()
    assert "".join(found := articles(real)) == real
    assert len(found) == 60
    (tmp_path / "b.txt").write_text("one<|endoftext|>\n<|endoftext|> two \n")
    assert read(tmp_path / "b.txt") == ["one", "two"]


def test_wikitext_and_tulu_as_the_hub_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = ["" if line == " \n" else line for line in WIKI.splitlines(keepends=True)]
    part = tmp_path / "wikitext-103-raw-v1"
    part.mkdir()
    for name, text in (("train", lines), ("validation", ["only this"])):
        pyarrow.parquet.write_table(pyarrow.table({"text": text}), part / f"{name}-00000-of-00001.parquet")
    (tmp_path / "data").mkdir()
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    chats = pyarrow.table({"dataset": ["x"], "messages": [messages]})
    pyarrow.parquet.write_table(chats, tmp_path / "data" / "train-00000.parquet")
    monkeypatch.setattr(hub_datasets, "download", lambda name, dataset: tmp_path)
    assert documents.from_hub("wikitext-103") == articles(WIKI)
    assert documents.from_hub("wikitext-103-valid") == ["only this"]
    (row,) = instruction_datasets.load_rows("tulu")
    assert isinstance(row, ConversationRow)
    assert row.messages == (Message("system", "s"), Message("user", "u"), Message("assistant", "a"))


def test_long_answers_are_cut_and_long_prompts_are_not():
    long = Example.completion(tuple(range(20)), 6)
    assert truncate(long, 20) == long
    assert truncate(long, 9) == Example.completion(tuple(range(9)), 6)
    assert truncate(long, 8) == Example.completion(tuple(range(8)), 6)  # two tokens of the answer
    assert truncate(long, 7) == long
    examples, dropped = packing.filter_by_length([truncate(long, width) for width in (8, 7)], 8, drop=True)
    assert (len(examples), dropped.long, dropped.empty) == (1, 1, 0)
    assert packing.collate([examples]).weights.tolist() == [[0, 0, 0, 0, 0, 1, 1, 0]]
