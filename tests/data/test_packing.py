"""Packing: no example lost, no example seen by another, no loss changed."""

import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fgpt
from fgpt.data.examples import Example
from fgpt.data.packing import DropCounts, collate, epoch_batches, filter_by_length, pack
from fgpt.data.prompt_templates import PLAIN, InstructionRow, encode
from fgpt.errors import InputError
from fgpt.losses import nll
from fgpt.model import Config, hidden, init
from fgpt.rng import key
from fgpt.tokenizers.tiktoken_bpe import RANKS, from_ranks

TOKENIZER = from_ranks(Path(fgpt.__file__).parent / "nano" / RANKS)
VOCAB = 40
GPT = init(Config(n_layer=2, n_head=2, d_model=16, n_ctx=64, vocab_size=VOCAB, d_mlp=32), key(0))

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
row_texts = st.builds(InstructionRow, texts, texts, texts.filter(str.strip))


@st.composite
def documents(draw: st.DrawFn) -> Example:
    length = draw(st.integers(2, 20))
    tokens = draw(st.lists(st.integers(1, VOCAB - 1), min_size=length, max_size=length))
    return Example.completion(tuple(tokens), draw(st.integers(0, length - 2)))


@settings(max_examples=200)
@given(st.data(), st.integers(1, 70))
def test_pack_is_first_fit(data: st.DataObject, capacity: int):
    lengths = data.draw(st.lists(st.integers(0, capacity), max_size=100))
    bins: list[list[int]] = []
    for i, length in enumerate(lengths):
        room = (b for b in bins if sum(lengths[j] for j in b) + length <= capacity)
        home = next(room, None)
        bins.append([i]) if home is None else home.append(i)
    assert pack(lengths, capacity) == bins


def test_pack_is_fast_and_tight():
    lengths = (torch.randn(52_000, generator=key(0)) * 0.6 + 4.6).exp().clamp(1, 512).long().tolist()
    begin = time.perf_counter()
    bins = pack(lengths, 512)
    assert time.perf_counter() - begin < 10  # 0.4 s alone on one core
    assert len(bins) < 1.02 * sum(lengths) / 512


def test_pack_refuses_what_cannot_fit():
    with pytest.raises(InputError, match=r"^row 2 has 9 tokens, the limit is 8: .*"):
        pack([8, 9], 8)


@given(st.lists(documents(), min_size=1, max_size=40), st.integers(1, 4), st.booleans(), st.integers(0, 9))
def test_an_epoch_loses_and_repeats_nothing(examples: list[Example], rows: int, packed: bool, seed: int):
    rng = key(seed)
    before = rng.get_state()
    batches = epoch_batches(examples, 24, rows, rng, packed)
    assert Counter(e for batch in batches for row in batch for e in row) == Counter(examples)
    assert all(sum(len(e.tokens) for e in row) <= 24 for batch in batches for row in batch)
    assert all(1 <= len(batch) <= rows for batch in batches)
    assert packed or all(len(row) == 1 for batch in batches for row in batch)
    assert batches == epoch_batches(examples, 24, rows, key(seed), packed)
    assert torch.equal(before, rng.get_state())


def test_keys_shuffle_and_unpacked_batches_pad_little():
    lengths = torch.randint(2, 200, (4096,), generator=key(1)).tolist()
    examples = [Example.completion(tuple(range(n)), 0) for n in lengths]
    batches = epoch_batches(examples, 200, 8, key(0), packed=False)
    assert batches != epoch_batches(examples, 200, 8, key(1), packed=False)
    padded = sum(len(batch) * max(len(row[0].tokens) for row in batch) for batch in batches)
    assert padded < 1.05 * sum(lengths)  # in random batches of 8 it is about 1.75
    firsts = [len(batch[0][0].tokens) for batch in batches[:100]]
    assert firsts != sorted(firsts)


@given(st.lists(st.lists(documents(), min_size=1, max_size=4), min_size=1, max_size=4), st.integers(0, 5))
def test_collate_against_its_definition(rows: list[list[Example]], extra: int):
    width = max(sum(len(e.tokens) for e in row) for row in rows) + extra
    batch = collate(rows, width)
    assert batch.tokens.shape == (len(rows), width)
    assert batch.loss_positions is not None
    positive = set()
    for r, row in enumerate(rows):
        owner = [(n, i) for n, e in enumerate(row) for i in range(len(e.tokens))]
        owner += [(-1, 0)] * (width - len(owner))
        for c, (n, i) in enumerate(owner):
            if batch.segments is not None:
                assert batch.segments[r, c] == n + 1
            else:
                assert n <= 0
            assert batch.tokens[r, c] == (row[n].tokens[i] if n >= 0 else 0)
            inside = n >= 0 and i + 1 < len(row[n].tokens)
            in_answer = inside and i + 1 >= row[n].prompt_length
            assert batch.weights[r, c] == float(in_answer)
            if inside:
                assert batch.targets[r, c] == row[n].tokens[i + 1]
            if in_answer:
                positive.add(r * width + c)
    assert batch.loss_positions.tolist() == sorted(positive)
    assert batch.loss_positions.dtype == torch.int64
    assert (batch.segments is None) == all(len(row) == 1 for row in rows)


@given(st.lists(row_texts, min_size=1, max_size=4))
def test_the_end_of_each_answer_carries_loss_and_no_prompt_does(given_rows: list[InstructionRow]):
    examples = [encode(row, PLAIN, TOKENIZER) for row in given_rows]
    batch = collate([examples])
    targets = batch.targets[batch.weights > 0].tolist()
    assert targets == [token for e in examples for token in e.tokens[e.prompt_length :]]
    assert targets.count(TOKENIZER.eos_token_id) == len(examples)


@settings(max_examples=20, deadline=None)
@given(st.lists(documents(), min_size=1, max_size=8), st.integers(0, 4))
def test_packing_and_padding_change_no_loss(examples: list[Example], extra: int):
    alone = [nll(GPT, collate([[e]])) for e in examples]
    bins = pack([len(e.tokens) for e in examples], 40)
    packed = [[examples[i] for i in b] for b in bins]
    total, weight = nll(GPT, collate(packed, 40 + extra))
    assert weight == sum(w for _, w in alone)
    torch.testing.assert_close(total / weight, sum(v for v, _ in alone) / weight, atol=1e-5, rtol=0)
    for row, indices in zip(packed, bins, strict=True):  # a sum could hide what one row takes from another
        value, weight = nll(GPT, collate([row], 40 + extra))
        torch.testing.assert_close(value / weight, sum(alone[i][0] for i in indices) / weight, atol=1e-5, rtol=0)
    for example, (value, weight) in zip(examples, alone, strict=True):
        padded, _ = nll(GPT, collate([[example]], 50))
        torch.testing.assert_close(padded / weight, value / weight, atol=1e-5, rtol=0)


def test_no_document_sees_another():
    a, b, other = (
        Example.completion((1, 2, 3, 4), 1),
        Example.completion((5, 6, 7), 1),
        Example.completion((9, 8, 9, 8), 1),
    )
    one, two = collate([[a, b]]), collate([[other, b]])
    assert one.segments is not None
    left, right = (hidden(GPT, batch.tokens, batch.segments)[0, 4:] for batch in (one, two))
    assert torch.equal(left, right)
    assert not torch.equal(*(hidden(GPT, batch.tokens)[0, 4:] for batch in (one, two)))


def test_fit_refuses_or_counts():
    good, long, empty = (
        Example.completion((1, 2, 3), 1),
        Example.completion(tuple(range(9)), 1),
        Example.completion((1, 2), 1),
    )
    assert filter_by_length([good], 8) == ([good], DropCounts(0, 0))
    assert filter_by_length([long, good, empty, long], 8, drop=True) == ([good], DropCounts(2, 1))
    with pytest.raises(InputError, match=r"^row 2 has 9 tokens, the limit is 8: shorten it, raise the limit, or drop"):
        filter_by_length([good, long], 8)
    with pytest.raises(InputError, match=r"^row 3 has no response: give it one, or drop empty rows$"):
        filter_by_length([good, good, empty], 8)
    with pytest.raises(
        InputError, match=r"^no row with .* fits: 2 rows came, 1 above the limit of 8 tokens and 1 without"
    ):
        filter_by_length([long, empty], 8, drop=True)
    with pytest.raises(InputError, match=r"^no row with a response"):
        filter_by_length([], 8)
    with pytest.raises(InputError, match=r"^row 2 has no response"):
        epoch_batches([good, empty], 8, 1, key(0))
    with pytest.raises(InputError, match=r"^row 1 of the batch has 9 tokens, the limit is 8"):
        collate([[long]], 8)


@pytest.mark.parametrize("output", ["", " \n\t"])
def test_a_blank_answer_is_no_answer(output: str):
    with pytest.raises(InputError, match="row 1 has no response"):
        filter_by_length([encode(InstructionRow("Say nothing.", "", output), PLAIN, TOKENIZER)], 512)
