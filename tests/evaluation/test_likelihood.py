"""A score is its pair's alone and transformers' own; a window scores each token once."""

import math
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from builders import LargestTensor, hf_gpt2, tiny, tokens, with_noise
from builders.hf_models import hf_model, save_and_load
from hypothesis import given, settings
from hypothesis import strategies as st

import fgpt
from fgpt.evaluation import likelihood, request_batches
from fgpt.evaluation.likelihood import (
    LogLikelihood,
    loglikelihood,
    loglikelihood_rolling,
    perplexity,
    window_and_stride,
    windows,
)
from fgpt.model import hidden_after, read_prompts
from fgpt.tree import astype, replace_at

MODELS = ("gpt2", "llama", "neox")


@cache
def both(name: str) -> tuple[Any, fgpt.GPT]:
    """A model of transformers', and ours of the same weights; the context is 24."""
    model = hf_gpt2() if name == "gpt2" else hf_model(name)
    return model, save_and_load(model)


def reference(model: Any, context: list[int], continuation: list[int]) -> tuple[list[float], list[bool]]:
    """By transformers' model, one pair at a time and without padding."""
    row = [*context, *continuation][:-1][-24:]
    with torch.no_grad():
        log_probs = model(torch.tensor([row])).logits[0, -len(continuation) :].double().log_softmax(-1)
    chosen = torch.tensor(continuation)
    return log_probs.gather(-1, chosen[:, None])[:, 0].tolist(), (log_probs.argmax(-1) == chosen).tolist()


some_tokens = st.integers(0, 30)
some_pairs = st.lists(
    st.tuples(st.lists(some_tokens, min_size=1, max_size=30), st.lists(some_tokens, min_size=1, max_size=24)),
    min_size=1,
    max_size=7,
)


# ---------------------------------------------------------------------------------------------------------------- pairs


def test_a_table_of_pairs_worked_by_hand():
    """A model whose next token depends on the last one alone, by a table of our own."""
    chances = torch.tensor(
        [[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]]
    )
    cfg = fgpt.Config(1, 1, 4, 8, 4, 4, tie_word_embeddings=False, biases=frozenset({"norm"}))
    bare = fgpt.init(cfg, fgpt.key(0))
    spread = (1 / 4 - 1 / 16 + cfg.norm_eps) ** 0.5  # of the row of an identity: ln_f is made to give it back
    leaves = {"wte.w": torch.eye(4), "wpe.w": torch.zeros(8, 4), "head.w": chances.log().T.contiguous()}
    leaves |= {"ln_f.w": torch.full((4,), spread), "ln_f.b": torch.full((4,), 0.25)}
    leaves |= {f"blocks.0.{x}.w": torch.zeros(4, 4) for x in ("attn.o", "mlp.down")}
    params = replace_at(bare, leaves)
    first, second, third = loglikelihood(params, [([0], [1, 3]), ([2, 3], [0]), ([1], [3, 0, 0])])
    assert math.exp(first.total) == pytest.approx(0.25 * 0.4, rel=1e-5)
    assert first.greedy == [False, True]
    assert math.exp(second.total) == pytest.approx(0.7, rel=1e-5)
    assert [math.exp(x) for x in third.logprobs] == pytest.approx([0.4, 0.7, 0.5], rel=1e-5)
    assert third.greedy == [True, True, True]
    whole = loglikelihood_rolling(params, [1, 3, 0, 0], bos_token_id=0, width=2, stride=1)
    assert math.exp(whole.total) == pytest.approx(0.25 * 0.4 * 0.7 * 0.5, rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
@given(pairs=some_pairs, rows=st.integers(1, 8), data=st.data())
def test_a_score_is_its_pairs_alone_and_transformers(name: str, pairs: list[Any], rows: int, data: st.DataObject):
    """Whatever its neighbors, their order and number; contexts too long lose what transformers is not shown either."""
    model, params = both(name)
    order = data.draw(st.permutations(range(len(pairs))))
    shuffled = loglikelihood(params, [pairs[i] for i in order], batch_size=rows)
    for i, got in zip(order, shuffled, strict=True):
        (alone,) = loglikelihood(params, [pairs[i]])
        expected, greedy = reference(model, *pairs[i])
        assert got.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
        assert got.logprobs == pytest.approx(expected, abs=2e-5)
        assert got.greedy == alone.greedy == greedy
        assert got.total == pytest.approx(math.fsum(expected), abs=1e-4)
        assert got.truncated == alone.truncated == max(0, len(pairs[i][0]) + len(pairs[i][1]) - 1 - 24)


some_choices = st.lists(st.lists(some_tokens, min_size=1, max_size=8), min_size=1, max_size=6)


@pytest.mark.parametrize("name", MODELS)
@given(
    header=st.lists(some_tokens, min_size=1, max_size=9),
    questions=st.lists(st.tuples(st.lists(some_tokens, min_size=1, max_size=12), some_choices), min_size=1, max_size=3),
    least=st.integers(1, 6),
    rows=st.integers(1, 8),
)
def test_choices_after_one_context_score_as_by_themselves(
    name: str, header: list[int], questions: list[Any], least: int, rows: int
):
    """However many examples and questions they share, and whatever of a context is lost."""
    model, params = both(name)
    pairs = [([*header, *question], choice) for question, choices in questions for choice in choices]
    with patch.object(request_batches, "LEAST_SHARED", least):
        together = loglikelihood(params, pairs, batch_size=rows)
    for pair, got in zip(pairs, together, strict=True):
        expected, greedy = reference(model, *pair)
        assert got.logprobs == pytest.approx(expected, abs=2e-5)
        assert got.greedy == greedy
        assert got.truncated == max(0, len(pair[0]) + len(pair[1]) - 1 - 24)


def test_a_context_is_read_once_for_all_its_choices(monkeypatch: pytest.MonkeyPatch):
    """By hand: two contexts of 17 and 19 tokens, five choices of three tokens each; then one of 17 for ten."""
    prompts_read: list[tuple[int, ...]] = []
    rows_read: list[tuple[int, ...]] = []

    def record_prompts(params: fgpt.GPT, prompts: Any) -> fgpt.KVCache:
        prompts_read.append(tuple(prompts.tokens.shape))
        return read_prompts(params, prompts)

    def record_rows(params: fgpt.GPT, cache: fgpt.KVCache, rows: Any, x: torch.Tensor, where: Any) -> torch.Tensor:
        rows_read.append(tuple(x.shape))
        return hidden_after(params, cache, rows, x, where)

    monkeypatch.setattr(likelihood, "read_prompts", record_prompts)
    monkeypatch.setattr(likelihood, "hidden_after", record_rows)

    def read(pairs: list[Any], batch_size: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        prompts_read.clear()
        rows_read.clear()
        loglikelihood(tiny(), pairs, batch_size=batch_size)
        return prompts_read, rows_read

    contexts = [tokens(31, n, seed=n).tolist() for n in (17, 19)]
    pairs = [(context, [choice, 1, 2]) for context in contexts for choice in range(5)]
    assert read(pairs, 10) == ([(2, 18)], [(10, 3)])  # of a context's tokens the last is in the rows
    assert read(pairs, 4) == ([(1, 18), (2, 18), (1, 16)], [(4, 3), (4, 3), (2, 3)])
    assert read([(contexts[0], [choice, 1, 2]) for choice in range(10)], 4) == ([(1, 16)], [(4, 3), (4, 3), (2, 3)])


def test_what_greedy_decoding_writes_is_greedy():
    params = tiny()
    (generated,) = fgpt.generate(params, [[3, 1, 4]], eos_token_id=-1, max_new_tokens=10)
    (got,) = loglikelihood(params, [([3, 1, 4], generated.tokens)])
    assert all(got.greedy)
    (other,) = loglikelihood(
        params, [([3, 1, 4], [*generated.tokens[:4], (generated.tokens[4] + 1) % 31, *generated.tokens[5:]])]
    )
    assert other.greedy[:5] == [True] * 4 + [False]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each forward pass, as it happens."""
    counts: list[int] = []

    def count_rows(params: fgpt.GPT, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        counts.append(len(x))
        return fgpt.hidden_at(params, x, positions)

    monkeypatch.setattr(likelihood, "hidden_at", count_rows)
    return counts


def test_turns_of_a_conversation_are_read_once_and_score_as_by_themselves(rows: list[int]):
    params = tiny()
    text, other = tokens(31, 2, 20).tolist()
    turns = [(text[:3], text[3:6]), (other[:4], other[4:]), (text[:9], text[9:15]), (text[:15], text[15:])]
    together = loglikelihood(params, turns)
    assert rows == [2]
    for pair, got in zip(turns, together, strict=True):
        [alone] = loglikelihood(params, [pair])
        assert got.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
        assert (got.greedy, got.truncated) == (alone.greedy, alone.truncated)


def test_choices_of_one_token_are_read_once(rows: list[int]):
    params = tiny()
    got = loglikelihood(params, [([1, 2, 3], [choice]) for choice in range(31)])
    assert rows == [1]
    assert math.fsum(math.exp(x.total) for x in got) == pytest.approx(1, abs=1e-5)
    assert sum(x.greedy[0] for x in got) == 1


def test_adapted_quantized_and_bf16_models_are_scored():
    params = tiny(d_model=64, d_mlp=64)
    adapters = with_noise(fgpt.lora(params, fgpt.key(0), 2))
    pairs = [([1, 2], [3, 4, 5]), ([6], [7])]
    tuned = fgpt.adapt(params, adapters)
    (factored, _), (merged, _) = loglikelihood(tuned, pairs), loglikelihood(fgpt.merge(tuned), pairs)
    assert factored.logprobs == pytest.approx(merged.logprobs, abs=1e-4)
    for other in (fgpt.quantize(params, "nf4"), astype(params, torch.bfloat16)):
        for many, pair in zip(loglikelihood(other, pairs), pairs, strict=True):
            assert many.total == pytest.approx(loglikelihood(other, [pair])[0].total, rel=0.05)


# ----------------------------------------------------------------------------------------------------------- long texts


@given(
    text=st.lists(some_tokens, max_size=60),
    sizes=st.integers(1, 20).flatmap(lambda w: st.tuples(st.just(w), st.integers(1, w))),
)
def test_each_token_is_scored_once_after_what_precedes_it(text: list[int], sizes: tuple[int, int]):
    width, stride = sizes
    pairs = windows(text, 99, width=width, stride=stride)
    assert [token for _, new in pairs for token in new] == text
    whole, done = [99, *text], 0
    for i, (context, new) in enumerate(pairs):
        assert len(context) + len(new) - 1 <= width
        assert len(new) <= (stride if i else width)
        assert context == whole[done + 1 - len(context) : done + 1]
        assert len(context) >= (width - stride + 1 if i else 1)
        done += len(new)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=8)
@given(length=st.integers(1, 90), width=st.integers(1, 24), data=st.data())
def test_a_sliding_window_is_transformers(name: str, length: int, width: int, data: st.DataObject):
    """Position by position: each token's probability after all that its window shows of what precedes it."""
    stride, rows = data.draw(st.integers(1, width)), data.draw(st.integers(1, 5))
    model, params = both(name)
    text = tokens(31, length, seed=length).tolist()
    got = loglikelihood_rolling(params, text, bos_token_id=7, width=width, stride=stride, batch_size=rows)
    whole, expected = [7, *text], []
    for at in range(length):
        window = max(0, -(-(at + 1 - width) // stride))  # which of them scores the token
        end = min(width + window * stride, length)
        start = max(0, end - width)
        expected += reference(model, whole[start : at + 1], [text[at]])[0]
    assert got.logprobs == pytest.approx(expected, abs=2e-5)
    assert (len(got.greedy), got.truncated) == (length, 0)


def test_logits_of_a_long_text_are_never_there_at_once(monkeypatch: pytest.MonkeyPatch):
    params = tiny(n_ctx=256, vocab_size=2000)
    monkeypatch.setattr(likelihood, "CHUNK_BYTES", 4 * 2000 * 16)
    with LargestTensor() as recorder:
        loglikelihood_rolling(params, tokens(2000, 500).tolist(), bos_token_id=0, width=256, stride=128)
    assert recorder.numel < 256 * 2000 / 4


def test_room_is_the_context_unless_it_is_very_long():
    assert window_and_stride(fgpt.Config(1, 1, 8, 1024, 9, 8)) == (1024, 512)
    assert window_and_stride(fgpt.Config(1, 1, 8, 131072, 9, 8)) == (2048, 1024)
    assert window_and_stride(fgpt.Config(1, 1, 8, 64, 9, 8), stride=64) == (64, 64)


# ----------------------------------------------------------------------------------------------------------- perplexity


def test_perplexities_count_tokens_bytes_and_words_of_the_text():
    """Two words and nine bytes, each of four tokens at 1/8: 12 bits in all."""
    got = perplexity([math.log(1 / 8)] * 4, "naïve fox")
    assert (got.tokens, got.bytes, got.words) == (4, 10, 2)
    assert got.per_token == pytest.approx(8)
    assert got.loss == pytest.approx(math.log(8))
    assert got.bits_per_byte == pytest.approx(12 / 10)
    assert got.per_byte == pytest.approx(2**1.2)
    assert got.per_word == pytest.approx(2**6)
    assert got._replace(words=3).per_word == pytest.approx(2**4)
    assert perplexity([-1000.0], "日本").per_word == math.inf
    assert perplexity([-1.0], "\n").per_word == math.inf


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        (([], [1]), "request 1 has 0 tokens of context and 1 to score: expected 1 or more of context"),
        (([1], []), "request 1 has 1 tokens of context and 0 to score"),
        (([1], [2] * 25), "25 to score: expected .* 1 to 24 to score, the model's context"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_is(pair: Any, says: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(likelihood, "hidden_at", None)
    with pytest.raises(fgpt.InputError, match=says):
        loglikelihood(tiny(), [([1], [2]), pair])


def test_other_bad_input_is_refused():
    params = tiny()
    for width, stride, says in (
        (8, 9, "expected 1 <= stride <= width"),
        (8, 0, "a stride of 0"),
        (25, 4, "context of 24"),
    ):
        with pytest.raises(fgpt.InputError, match=says):
            loglikelihood_rolling(params, [1, 2], bos_token_id=0, width=width, stride=stride)
    with pytest.raises(fgpt.InputError, match="batch_size is 0"):
        loglikelihood(params, [([1], [2])], batch_size=0)
    with pytest.raises(fgpt.InputError, match="expected 1 or more of each"):
        perplexity([], "a")
    broken = replace_at(params, {"wte.w": torch.full((31, 16), math.nan)})
    with pytest.raises(fgpt.InputError, match="the log-likelihood of request 0 is not finite"):
        loglikelihood(broken, [([5], [2])])
    assert loglikelihood(params, []) == []
    assert loglikelihood_rolling(params, [], bos_token_id=0) == LogLikelihood([], [])
