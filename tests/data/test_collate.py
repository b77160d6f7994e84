"""Batches are those of a definition that goes token by token, and their bounds are those of the segments."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from builders import close
from hypothesis import given
from hypothesis import strategies as st

from fgpt.data.examples import Example, Span
from fgpt.data.packing import collate
from fgpt.kernels.documents import Documents
from fgpt.losses import Batch


def reference(rows: Sequence[Sequence[Example]], seq_len: int) -> Batch:
    """Token by token, in lists."""
    tokens, targets, weights, segments = [], [], [], []
    for row in rows:
        row_tokens, row_targets, row_weights, row_segments = [], [], [], []
        for segment, example in enumerate(row, 1):
            weight_of = {i: weight for start, end, weight in example.spans for i in range(start, end)}
            row_tokens += example.tokens
            row_targets += [*example.tokens[1:], example.label or 0]
            row_weights += [weight_of.get(i + 1, 0.0) for i in range(len(example.tokens))]
            row_segments += [segment] * len(example.tokens)
        padding = [0] * (seq_len - len(row_tokens))
        tokens.append(row_tokens + padding)
        targets.append(row_targets + padding)
        weights.append(row_weights + padding)
        segments.append(row_segments + padding)
    weights = torch.tensor(weights, dtype=torch.float32)
    packed = any(len(row) > 1 for row in rows)
    return Batch(
        torch.tensor(tokens),
        torch.tensor(targets),
        weights,
        torch.tensor(segments) if packed else None,
        weights.flatten().nonzero().flatten(),
    )


@st.composite
def examples(draw: Callable[..., Any]) -> Example:
    tokens = draw(st.lists(st.integers(0, 300), min_size=1, max_size=12))
    label = draw(st.none() | st.integers(0, 9))
    if label is not None:
        return Example.classification(tuple(tokens), label)
    bounds = sorted(draw(st.lists(st.integers(0, len(tokens)), max_size=6)))
    weights = st.sampled_from([1.0, 0.0, 0.25, 1e-3])
    return Example(tuple(tokens), tuple(Span(a, b, draw(weights)) for a, b in zip(bounds[::2], bounds[1::2])))


packed_rows = st.lists(st.lists(examples(), min_size=1, max_size=6), min_size=1, max_size=4)


@given(packed_rows, st.none() | st.integers(0, 40))
def test_collate_is_its_definition(rows: list[list[Example]], extra: int | None):
    longest = max(sum(len(example.tokens) for example in row) for row in rows)
    pad_to = None if extra is None else longest + extra
    batch, expected = collate(rows, pad_to), reference(rows, pad_to or longest)
    for name in ("tokens", "targets", "weights", "segments", "loss_positions"):
        x, y = getattr(batch, name), getattr(expected, name)
        assert (x is None) == (y is None)
        assert x is None or (x.dtype == y.dtype and torch.equal(x, y))


@given(packed_rows, st.integers(0, 40))
def test_bounds_are_those_of_the_segments(rows: list[list[Example]], extra: int):
    longest = max(sum(len(example.tokens) for example in row) for row in rows)
    batch, seq = collate(rows, longest + extra), longest + extra
    assert (batch.cu_seqlens is None) == (batch.segments is None)
    if batch.cu_seqlens is None or batch.segments is None:
        return
    assert batch.cu_seqlens.dtype == torch.int32
    same = batch.segments[:, :, None] == batch.segments[:, None, :]
    causal = same & torch.ones(seq, seq, dtype=torch.bool).tril()
    documents = Documents(batch.cu_seqlens)
    assert torch.equal(documents.mask(seq), causal[:, None])
    close(documents.positions(seq), causal.sum(-1) - 1, 0)
    close(documents.lengths(seq), same.sum(-1), 0)


def test_bounds_have_one_shape():
    short, long = Example.completion((1, 2, 3), 1), Example.completion(tuple(range(60)), 1)
    shapes = [collate([row], 256).cu_seqlens for row in ([short, long], [long] * 4, [short] * 7)]
    assert [x is not None and tuple(x.shape) for x in shapes] == [(1, 9)] * 3
    many = collate([[short] * 8], 256).cu_seqlens
    assert many is not None
    assert tuple(many.shape) == (1, 17)
