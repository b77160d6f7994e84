"""What may come next is what transformers' processors leave, and what is drawn has their distribution."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as hf

import fgpt
from fgpt.errors import InputError
from fgpt.generation import sampling as S
from fgpt.rng import fold_in

# -------------------------------------------------------------------------------------------------------------- filters


class Case(NamedTuple):
    """A batch, and its texts without padding."""

    logits: Tensor
    texts: list[list[int]]

    @property
    def seen(self) -> Tensor:
        return padded(self.texts)


def padded(texts: list[list[int]]) -> Tensor:
    width = max(map(len, texts))
    return torch.tensor([[-1] * (width - len(text)) + text for text in texts], dtype=torch.long)


@st.composite
def cases(draw: Any) -> Case:
    """Ragged texts, some empty, some with a token past the vocabulary; logits with ties and -inf, never -inf alone.

    At most 16 tokens: of more, transformers' sort leaves open which of several tied tokens comes first.
    """
    rows, vocab = draw(st.integers(1, 4)), draw(st.integers(1, 16))
    texts = draw(st.lists(st.lists(st.integers(0, vocab), max_size=12), min_size=rows, max_size=rows))
    few = st.sampled_from([-math.inf, -2.0, -0.5, 0.0, 0.5, 1.0, 4.0])
    number = few | st.floats(-20, 20, width=32)
    logits = torch.tensor(
        draw(st.lists(st.lists(number, min_size=vocab, max_size=vocab), min_size=rows, max_size=rows))
    )
    finite = draw(st.lists(st.integers(0, vocab - 1), min_size=rows, max_size=rows))
    logits[range(rows), finite] = logits[range(rows), finite].clamp(min=-20)
    return Case(logits, texts)


def agrees(ours: S.LogitsProcessor, theirs: Callable[[Any, Any], Any], case: Case) -> None:
    """Bitwise, the batch with each of its rows alone; and the inputs are as they were."""
    logits, seen = case.logits.clone(), case.seen
    out = ours(logits, seen)
    assert torch.equal(logits, case.logits)
    assert torch.equal(seen, case.seen)
    alone = [
        theirs(torch.tensor([text], dtype=torch.long), row[None].clone())
        for text, row in zip(case.texts, case.logits, strict=True)
    ]
    assert torch.equal(out, torch.cat(alone))


SHARES = st.sampled_from([1e-6, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]) | st.floats(0.001, 1)
FACTORS = st.sampled_from([0.5, 1.0, 2.0]) | st.floats(0.1, 10)
FILTERS = {
    "temperature": (S.temperature, hf.TemperatureLogitsWarper, FACTORS),
    "top_k": (S.top_k, hf.TopKLogitsWarper, st.integers(1, 20)),
    "top_p": (S.top_p, hf.TopPLogitsWarper, SHARES),
    "min_p": (S.min_p, hf.MinPLogitsWarper, SHARES),
    "repetition_penalty": (S.repetition_penalty, hf.RepetitionPenaltyLogitsProcessor, FACTORS),
    "no_repeat_ngram": (S.no_repeat_ngram, hf.NoRepeatNGramLogitsProcessor, st.integers(1, 5)),
}


@pytest.mark.parametrize("name", FILTERS)
@given(cases(), st.data())
def test_a_filter_is_transformers(name: str, case: Case, data: st.DataObject):
    ours, theirs, values = FILTERS[name]
    value = data.draw(values)
    agrees(ours(value), theirs(value), case)


@given(cases(), st.data())
def test_the_chain_is_transformers(case: Case, data: st.DataObject):
    """With any of the filters, at temperature 0 and above; order matters, and so it is theirs."""
    names = ("repetition_penalty", "no_repeat_ngram", "temperature", "top_k", "top_p", "min_p")
    values: dict[str, Any] = {name: data.draw(st.none() | FILTERS[name][2]) for name in names}
    values["temperature"] = values["temperature"] or 0.0
    used = {name: v for name, v in values.items() if v and (values["temperature"] or name in names[:2])}
    theirs = hf.LogitsProcessorList([FILTERS[name][1](v) for name, v in used.items()])

    agrees(S.SamplingParams(**values).logits_processor, theirs, case)


@pytest.mark.parametrize("p", [0.3, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("step", [0, 0.25], ids=["distinct", "tied"])
def test_top_p_of_a_large_vocabulary(p: float, step: float):
    """Where most tokens are hopeless. Of tied tokens transformers keeps as many, if not the same."""
    logits = torch.randn(4, 5000, generator=fgpt.key(0)) * torch.tensor([[0.5], [1.0], [3.0], [6.0]])
    logits = (logits / step).round() * step if step else logits
    nothing: Any = padded([[]] * 4)
    out, theirs = S.top_p(p)(logits, nothing), hf.TopPLogitsWarper(p)(nothing, logits)
    assert torch.equal(out.sort(-1).values, theirs.sort(-1).values)
    assert step or torch.equal(out, theirs)


def test_of_tied_tokens_the_higher_numbers_are_in_the_nucleus():
    out = S.top_p(0.5)(torch.zeros(1, 400), padded([[]]))
    assert out[0].isfinite().tolist() == [False] * 200 + [True] * 200


def test_a_nucleus_smaller_than_rounding_is_one_token():
    assert S.top_p(1e-9)(torch.tensor([[0.0, 3.0, 3.0]]), padded([[]])).isfinite().tolist() == [[False, False, True]]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_text_as_long_as_the_ngram_can_repeat_it(n: int):
    out = S.no_repeat_ngram(n)(torch.zeros(2, 3), padded([[1] * n, [1] * (n - 1)]))
    assert out.isfinite().tolist() == [[True, False, True], [True] * 3]


def test_bf16_stays_and_probabilities_are_fp32():
    logits, seen = torch.randn(3, 12, generator=fgpt.key(1)).bfloat16(), padded([[1, 2, 1], [3], []])
    for name, value in {"temperature": 0.7, "top_k": 3, "repetition_penalty": 1.3, "no_repeat_ngram": 2}.items():
        ours, theirs, _ = FILTERS[name]
        out = ours(value)(logits, seen)
        assert out.dtype == torch.bfloat16
        row = theirs(value)(torch.tensor([[1, 2, 1]]), logits[:1])
        assert torch.equal(out[:1], row)
    many = torch.randn(3, 1000, generator=fgpt.key(2)).bfloat16()  # sums in bf16 would be off by whole tokens
    assert torch.equal(S.top_p(0.5)(many, seen).float(), S.top_p(0.5)(many.float(), seen))
    near = torch.tensor([[0.0, -0.001]], dtype=torch.bfloat16)  # 0.999 as likely, in bf16 just as likely
    assert S.min_p(1.0)(near, seen[:1]).isfinite().tolist() == [[True, False]]
    assert S.min_p(0.5)(near, seen[:1]).dtype == S.top_p(0.5)(near, seen[:1]).dtype == torch.bfloat16


def test_a_chain_of_none_is_the_identity_and_order_is_from_the_left():
    logits, seen = torch.tensor([[1.0, 2.0, 3.0]]), padded([[2]])
    assert torch.equal(S.compose()(logits, seen), logits)
    only, halved = S.top_k(1), S.repetition_penalty(3.0)
    assert S.compose(only, halved)(logits, seen).tolist() == [[-math.inf, -math.inf, 1.0]]
    assert S.compose(halved, only)(logits, seen).tolist() == [[-math.inf, 2.0, -math.inf]]


def test_the_order_of_the_filters():
    """Each case leaves something else in any other order."""
    logits, seen = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log(), padded([[1]])
    for sampling, kept in (
        (S.SamplingParams(1.0, top_k=2, top_p=0.5), [0]),  # 0.4 / 0.7 is above a half, 0.4 is not
        (S.SamplingParams(1.0, top_p=0.5, min_p=0.6), [0, 1]),  # of these two alone, one would be the nucleus
        (S.SamplingParams(0.5, top_p=0.5), [0]),  # squared, it has 16 parts of 30
        (S.SamplingParams(1.0, top_k=2, repetition_penalty=2.0), [0, 2]),
        (S.SamplingParams(1.0, top_k=2, no_repeat_ngram=1), [0, 2]),
    ):
        assert sampling.logits_processor(logits, seen)[0].isfinite().nonzero()[:, 0].tolist() == kept


# -------------------------------------------------------------------------------------------------------------- drawing

LOGITS = torch.tensor([2.0, -1.0, 0.3, 0.3, -math.inf, 1.1, -3.0, 0.9, 0.0, -0.4])


def row_keys(n: int, seed: int = 0) -> list[torch.Generator]:
    return [fold_in(fgpt.key(seed), i) for i in range(n)]


def p_value(counts: Tensor, probs: Tensor) -> float:
    """Of Pearson's chi-square test: how likely counts at least so far from n·probs are, were probs the truth.

    x = Σ (counts - n·probs)² / (n·probs) has k - 1 degrees of freedom over k possible outcomes, and the tail of that
    distribution is the incomplete gamma function Q((k - 1) / 2, x / 2). An outcome that cannot be, and is, gives 0.
    """
    if counts[probs == 0].any():
        return 0.0
    expected, seen = counts.sum() * probs[probs > 0].double(), counts[probs > 0].double()
    assert expected.min() >= 5  # the rule of thumb for the approximation
    x = ((seen - expected).square() / expected).sum()
    degrees = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, x / 2))


SAMPLINGS = [
    S.SamplingParams(1.0),
    S.SamplingParams(0.7, top_k=5),
    S.SamplingParams(1.5, top_p=0.8),
    S.SamplingParams(1.0, min_p=0.2),
    S.SamplingParams(1.3, top_k=8, top_p=0.95, min_p=0.05, repetition_penalty=1.5, no_repeat_ngram=2),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_draws_have_the_filtered_distribution(sampling: S.SamplingParams):
    """At a threshold of 1e-4; counts of the plain softmax's draws, of a slightly warmer one's, are far below it."""
    n, seen = 20_000, padded([[5, 7, 2, 5]])
    one = sampling.logits_processor(LOGITS[None], seen)
    exact = one[0].double().softmax(-1)
    counts = S.sample(one.expand(n, -1), row_keys(n)).bincount(minlength=len(LOGITS))
    assert p_value(counts, exact) > 1e-4
    assert p_value(counts, (one[0].double() / 1.1).softmax(-1)) < 1e-4
    if sampling != S.SamplingParams(1.0):
        assert p_value(counts, LOGITS.double().softmax(-1)) < 1e-4


def test_steps_and_neighboring_rows_are_independent():
    """Pairs of draws, of one key's steps and of two rows' keys, have the product of the two distributions."""
    n, p = 20_000, LOGITS[[0, 2, 5, 7]].double().softmax(-1)
    logits, base = LOGITS[[0, 2, 5, 7]].expand(n, -1), fgpt.key(3)
    steps = S.sample(logits, [fold_in(base, step) for step in range(n)]).tolist()
    rows = S.sample(logits, [fold_in(fold_in(base, row), 1) for row in range(n)]).tolist()
    for drawn in (list(pairwise(steps))[::2], list(pairwise(rows))[::2], list(zip(steps, rows))):
        counts = torch.tensor([a * 4 + b for a, b in drawn]).bincount(minlength=16)
        assert p_value(counts, torch.outer(p, p).flatten()) > 1e-4
    twins = torch.tensor([a * 4 + a for a in steps]).bincount(minlength=16)
    assert p_value(twins, torch.outer(p, p).flatten()) == 0.0


def test_a_large_vocabulary_is_drawn_evenly():
    vocab, n, bins = 50_257, 4_000, 20
    logits = torch.zeros(1, vocab).expand(50, -1)
    drawn = torch.cat([S.sample(logits, row_keys(50, seed)) for seed in range(n // 50)])
    edges = [vocab * i // bins for i in range(bins + 1)]
    probs = torch.tensor([(b - a) / vocab for a, b in pairwise(edges)])
    counts = torch.histc(drawn.double(), bins=bins, min=0, max=vocab).long()
    assert p_value(counts, probs) > 1e-4
    assert len(drawn.unique()) > 0.9 * n  # collisions are few: about n² / 2 vocab, which is 160


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53])
def test_no_number_draws_a_forbidden_token(u: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(S, "uniform", lambda rng: u)
    logits = torch.full((2, 1000), -math.inf)
    logits[0, [3, 500, 996]], logits[1, 7] = torch.tensor([0.1, 2.0, -20.0]), -5.0
    assert S.sample(logits, row_keys(2)).tolist() == [3 if u == 0 else 996, 7]


def test_rare_tokens_come():
    """A token of chance 1e-9 behind a common one, which a sum in fp32 would swallow."""
    logits, tail = torch.tensor([[0.0, -20.7, -20.7]]), math.exp(-20.7)
    with pytest.MonkeyPatch.context() as patch:
        for u, token in ((1 - 2.5 * tail, 0), (1 - 1.5 * tail, 1), (1 - 0.5 * tail, 2)):
            patch.setattr(S, "uniform", lambda rng, u=u: u)
            assert S.sample(logits, row_keys(1)).tolist() == [token]


def test_a_uniform_is_the_key_and_does_not_advance_it():
    rng = fgpt.key(5)
    state = rng.get_state()
    assert S.uniform(rng) == S.uniform(rng) == S.uniform(fgpt.key(5))
    assert torch.equal(rng.get_state(), state)
    numbers = [S.uniform(fgpt.key(seed)) for seed in range(2000)]
    assert 0 <= min(numbers) < 0.01
    assert 0.99 < max(numbers) < 1
    assert len(set(numbers)) == 2000


def test_the_same_keys_draw_the_same_and_other_keys_another():
    logits, keys = torch.randn(64, 100, generator=fgpt.key(0)), row_keys(64)
    drawn = S.sample(logits, keys)
    assert torch.equal(drawn, S.sample(logits, keys))
    assert torch.equal(drawn, S.sample(logits, row_keys(64)))
    assert (drawn != S.sample(logits, row_keys(64, seed=1))).sum() > 32


@given(cases(), st.data())
def test_neighbors_do_not_matter(case: Case, data: st.DataObject):
    """A row alone is the row in the batch, and permuted rows draw permuted tokens, through every filter."""
    sampling = S.SamplingParams(0.8, top_k=7, top_p=0.95, min_p=0.01, repetition_penalty=1.2, no_repeat_ngram=4)
    logits = torch.cat([case.logits, torch.zeros(len(case.texts), 300)], -1)  # so that no row can run out of tokens
    keys = row_keys(len(case.texts))

    def drawn(order: list[int]) -> list[int]:
        allowed = sampling.logits_processor(logits[order], padded([case.texts[i] for i in order]))
        return S.sample(allowed, [keys[i] for i in order]).tolist()

    together = drawn(list(range(len(keys))))
    order = data.draw(st.permutations(range(len(keys))))
    assert drawn(order) == [together[i] for i in order]
    assert [drawn([i])[0] for i in order] == [together[i] for i in order]


def test_without_keys_the_likeliest_comes():
    assert S.sample(torch.tensor([[0.0, 3.0, 1.0], [-1.0, -math.inf, -0.5], [2.0, 2.0, 0.0]]), None).tolist() == [
        1,
        2,
        0,
    ]
    assert S.SamplingParams() == S.GREEDY
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert torch.equal(S.SamplingParams(top_k=1, top_p=0.1, min_p=1.0).logits_processor(logits, padded([[]])), logits)


# ------------------------------------------------------------------------------------------------------------ bad input

BAD = {
    "temperature": [-0.1, math.inf, math.nan],
    "top_k": [0, -3],
    "top_p": [0.0, 1.01, math.nan],
    "min_p": [0.0, -0.5, 1.01, math.nan],
    "repetition_penalty": [0.0, -1.0, math.inf, math.nan],
    "no_repeat_ngram": [0, -1],
}


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in BAD.items() for v in values], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bad_value_is_told_in_one_line(name: str, value: float, temperature: float):
    values: dict[str, Any] = {"temperature": temperature, name: value}
    with pytest.raises(InputError) as told:
        S.SamplingParams(**values)
    assert str(told.value).startswith(f"{name} is {value}: expected a ")
    assert "\n" not in str(told.value)
    with pytest.raises(InputError, match=f"{name} is {value}: expected a "):
        FILTERS[name][0](value)


def test_a_filter_has_no_temperature_zero():
    with pytest.raises(InputError, match=r"temperature is 0\.0: expected a number above 0$"):
        S.temperature(0.0)
    with pytest.raises(InputError, match=r"temperature is -1\.0: expected a number above 0, or 0 for greedy$"):
        S.SamplingParams(-1.0)


@pytest.mark.parametrize("bad", [-math.inf, math.nan, math.inf])
@pytest.mark.parametrize("drawn", [False, True])
def test_a_row_with_nothing_to_draw_is_an_error(bad: float, drawn: bool):
    logits = torch.zeros(3, 4)
    logits[1] = bad
    with pytest.raises(InputError, match=f"row 1 has a largest logit of {bad}: expected a finite number") as told:
        S.sample(logits, row_keys(3) if drawn else None)
    assert "\n" not in str(told.value)


def test_keys_are_one_a_row():
    with pytest.raises(InputError, match="2 keys for 3 rows: expected one for each row"):
        S.sample(torch.zeros(3, 4), row_keys(2))
