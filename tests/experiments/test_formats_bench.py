"""The benchmark of formats, of a tiny model."""

from pathlib import Path

import pytest
import torch
from builders import tiny, tokens

import fgpt
from experiments.bench.formats import FORMATS, check_apart, compare, read_text, windows

NANO = fgpt.tokenizer("nano")
MODEL = tiny(d_model=64, d_mlp=128)


def batches(seed: int) -> list[fgpt.Batch]:
    rows = [tokens(31, 4, 25, seed=seed + i) for i in range(2)]
    return [fgpt.Batch(x[:, :-1], x[:, 1:], torch.ones(4, 24)) for x in rows]


@pytest.mark.slow
def test_each_format_is_compared_with_fp32():
    evaluation = batches(7)
    scores = {score.format: score for score in compare(MODEL, batches(0), evaluation, FORMATS)}
    assert set(scores) == {"fp32", *FORMATS}
    exact = scores["fp32"]
    assert (exact.relative, exact.kl, exact.gradient_error) == (0, 0, 0)
    expected = sum(float(fgpt.loss(MODEL, batch)) for batch in evaluation) / 2
    assert exact.loss == pytest.approx(expected, rel=1e-5)
    for name in ("nf4", "fp4"):
        plain, better = scores[name], scores[f"{name}, GPTQ"]
        assert 0 < better.kl < plain.kl
        assert 0 < better.gradient_error < plain.gradient_error
        assert better.block_bytes == plain.block_bytes < exact.block_bytes


def test_windows_are_spread_over_a_text(tmp_path: Path):
    path = tmp_path / "text"
    path.write_text("".join(f"Tom has {i} red balls. " for i in range(400)))
    text = read_text(path)
    (batch,) = windows(NANO, text, count=3, width=16)
    assert batch.tokens.shape == (3, 16)
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    first, second, third = (NANO.decode(row.tolist()) for row in batch.tokens)
    assert text.startswith(first)
    assert 0 < text.index(second) < len(text) / 2 < text.index(third)
    with pytest.raises(fgpt.InputError, match="too short for 3 windows of 4000 tokens"):
        windows(NANO, text, count=3, width=4000)


def test_texts_that_overlap_are_refused():
    text = "".join(f"Tom has {i} red balls. " for i in range(400))
    evaluation = windows(NANO, text, count=2, width=64)
    check_apart("A text of its own.", NANO, evaluation)
    with pytest.raises(fgpt.InputError, match="has a part of the evaluation text"):
        check_apart(f"Before it. {text}", NANO, evaluation)
