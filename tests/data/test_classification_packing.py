"""Packed texts keep their labels; packed scoring is scoring one by one."""

from collections import Counter

import pytest
import torch
from builders import tiny, tokens
from hypothesis import given
from hypothesis import strategies as st

import fgpt
from fgpt.cli.inference.classifiers import (
    common_prefix_length,
    log_probabilities,
)
from fgpt.data.classification_prompts import (
    Labels,
    class_labels,
)
from fgpt.data.examples import Example
from fgpt.data.packing import collate, epoch_batches

labeled = st.builds(
    lambda tokens, label: Example.classification(tuple(tokens), label),
    st.lists(st.integers(0, 30), min_size=1, max_size=9),
    st.integers(0, 2),
)


@given(st.lists(labeled, min_size=1, max_size=12), st.integers(0, 5))
def test_packing_keeps_every_label_at_its_text_s_end(examples: list[Example], seed: int):
    counts: Counter[tuple[int, ...]] = Counter()
    for rows_ in epoch_batches(examples, 12, 2, fgpt.key(seed)):
        batch = collate(rows_)
        assert batch.weights.sum() == sum(len(row) for row in rows_)
        ends = [
            (r, sum(len(x.tokens) for x in row[: i + 1]) - 1) for r, row in enumerate(rows_) for i in range(len(row))
        ]
        assert batch.weights.nonzero().tolist() == [list(end) for end in ends]
        for (r, at), x in zip(ends, (x for row in rows_ for x in row), strict=True):
            assert batch.targets[r, at] == x.label
            counts[(*x.tokens, x.label or 0)] += 1
    assert counts == Counter((*x.tokens, x.label or 0) for x in examples)


@pytest.mark.slow
@given(st.lists(labeled, min_size=1, max_size=20), st.integers(9, 24))
def test_packed_scoring_is_scoring_one_by_one(examples: list[Example], width: int):
    params = fgpt.with_classification_head(tiny(), 3, fgpt.key(1))
    packed = log_probabilities(params, examples, class_labels("abc"), width)
    with torch.no_grad():
        alone = torch.stack([fgpt.apply(params, torch.tensor([x.tokens]))[0, -1].log_softmax(-1) for x in examples])
        few = torch.stack(
            [fgpt.apply(tiny(), torch.tensor([x.tokens]))[0, -1, [7, 3]].log_softmax(-1) for x in examples]
        )
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        log_probabilities(tiny(), examples, Labels(("x", "y"), (7, 3)), width), few, atol=1e-5, rtol=0
    )


@given(st.integers(1, 12), st.integers(1, 20), st.integers(0, 99))
def test_what_all_begin_with_is_read_once(common: int, rows: int, seed: int):
    """As shots are: the scores are those of each alone, and fewer tokens are read where it pays."""
    head = tokens(31, common, seed=seed).tolist()
    tails = [tokens(31, 1 + (seed + i) % 5, seed=seed + i + 1).tolist() for i in range(rows)]
    examples = [Example.classification((*head, *tail), 0) for tail in tails]
    assert common_prefix_length([x.tokens for x in examples]) >= min(common, min(len(x.tokens) for x in examples) - 1)
    params, read = fgpt.with_classification_head(tiny(), 3, fgpt.key(1)), []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for name in ("hidden_at", "forward_with_cache"):
            real = getattr(fgpt, name)
            patch.setattr(
                f"fgpt.cli.inference.classifiers.{name}",
                lambda p, x, *rest, real=real, **options: read.append(x.numel()) or real(p, x, *rest, **options),
            )
        found = log_probabilities(params, examples, class_labels("abc"), 24)
        alone = torch.stack([fgpt.apply(params, torch.tensor([x.tokens]))[0, -1].log_softmax(-1) for x in examples])
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
    if common > 5:
        assert sum(read) <= common + 5 * rows
    assert common_prefix_length([(1, 2, 3), (1, 2)]) == 1
    assert common_prefix_length([(1, 2, 3), (1, 3, 3)]) == 1
    assert common_prefix_length([(1,), (1,)]) == 0
