"""Intervals of scores over prompts: against draws of many samples, a paired t-test, and cases by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fgpt.cli.evaluation.compare.html import page
from fgpt.cli.evaluation.compare.intervals import FEWEST, Part, best_sides, half_widths
from fgpt.cli.evaluation.compare.markdown import to_markdown
from fgpt.cli.evaluation.compare.results import Answer, Comparison
from fgpt.cli.evaluation.compare.scores import instruction_scores, prompt_parts, rouge_scores
from fgpt.data.finqa import FinQA
from fgpt.data.prompt_templates import InstructionRow

VALUES = st.lists(st.floats(0, 100), min_size=FEWEST, max_size=40)


def plain(values: list[float]) -> list[Part]:
    return [Part(value, 1) for value in values]


@given(VALUES)
def test_of_a_mean_it_is_the_interval_of_the_t_distribution(values: list[float]):
    sample = torch.tensor(values, dtype=torch.float64)
    error = float(sample.std()) / math.sqrt(len(values))
    low, high = stats.t.interval(0.95, len(values) - 1, loc=0, scale=error or 1)
    width = half_widths({"x": plain(values)}).get("x", 0.0)
    assert width == pytest.approx((high - low) / 2 if error else 0, abs=1e-6)


def test_prompts_that_are_all_alike_have_no_interval():
    assert half_widths({"x": plain([100.0] * 50)}) == {}


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), min_size=FEWEST, max_size=30))
def test_two_sides_differ_where_a_paired_t_test_says_so(pairs: list[tuple[int, int]]):
    base, tuned = ([float(pair[i]) for pair in pairs] for i in (0, 1))
    best = best_sides({"base": {"points": plain(base)}, "tuned": {"points": plain(tuned)}})
    differences = [b - a for a, b in pairs]
    if len(set(differences)) == 1:
        expected = differences[0] != 0
    else:
        p = stats.ttest_rel(tuned, base).pvalue
        if abs(p - 0.05) < 1e-9:
            return
        expected = p < 0.05
    assert best == ({"points": ["tuned" if sum(differences) > 0 else "base"]} if expected else {})


def test_of_a_ratio_it_is_the_spread_of_many_samples():
    """Losses over answers of different lengths, drawn 20,000 times."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 60, (20_000, 80), generator=generator).double()
    nats = lengths * (2 + 0.5 * torch.randn(20_000, 80, generator=generator, dtype=torch.float64))
    nats += 20 * torch.randn(20_000, 80, generator=generator, dtype=torch.float64)
    spread = float((nats.sum(1) / lengths.sum(1)).std()) * float(stats.t.ppf(0.975, 79))
    widths = []
    for x, w in zip(nats[:200].tolist(), lengths[:200].tolist(), strict=True):
        widths.append(half_widths({"loss": [Part(*part) for part in zip(x, w, strict=True)]})["loss"])
    assert sum(widths) / len(widths) == pytest.approx(spread, rel=0.05)


def test_sides_that_cannot_be_told_from_the_best_are_best_too():
    noise = [3.0, -3.0] * 5
    sides = {"base": [10.0] * 10, "a": [50 + x for x in noise], "b": [51 - x for x in noise]}
    parts = {
        side: {"points": plain(values), "mean answer length (tokens)": plain(values)} for side, values in sides.items()
    }
    assert best_sides(parts) == {"points": ["a", "b"]}
    losses = {side: {"held-out response loss (nats per token)": plain(values)} for side, values in sides.items()}
    assert best_sides(losses) == {"held-out response loss (nats per token)": ["base"]}


def test_few_prompts_say_nothing():
    zeros, hundreds = plain([0.0] * 5), plain([100.0] * 5)
    assert best_sides({"base": {"points": zeros}, "tuned": {"points": hundreds}}) == {}
    six = {"base": {"points": [*zeros, Part(0, 1)]}, "tuned": {"points": [*hundreds, Part(100, 1)]}}
    assert best_sides(six) == {"points": ["tuned"]}
    absent = {side: {"points": [*parts["points"][:5], Part(0, 0)]} for side, parts in six.items()}
    assert best_sides(absent) == half_widths(absent["base"]) == {}  # the sixth prompt has no such score


def test_the_parts_of_prompts_add_up_to_the_scores():
    rows = [
        InstructionRow("Describe it in two sentences. Use the word 'red'.", "", "It is red. It is big."),
        InstructionRow("Say a word."),
        InstructionRow("List two hues.", "", "red, blue"),
        FinQA("How much?", "| a | 5 |", "5"),
        FinQA("How much?", "| a | 6 |", "6"),
    ]
    answers = [Answer(text, (1,), True) for text in ("It is red.", "Red.", "red, green", "5", "7")]
    scores = instruction_scores(rows, answers) | rouge_scores(rows, answers)
    parts = prompt_parts(rows, answers)
    for name in ("constraints met (%)", "FinQA exact match (%)", "ROUGE-L F1 (0 to 100)"):
        assert sum(x for x, _ in parts[name]) / sum(w for _, w in parts[name]) == pytest.approx(scores[name])
    assert [w for _, w in parts["constraints met (%)"]] == [2, 0, 1, 0, 0]


def test_pages_show_intervals_steps_and_what_is_best():
    scores = {"base": {"points (0 to 100)": 10.0}, "a|b": {"points (0 to 100)": 1234.5}}
    answers = {side: [Answer("x", (1,), True)] for side in scores}
    found = Comparison(
        *("t", ["About."], [InstructionRow("Say.")], answers, scores, {}),
        steps={"a|b": 1328},
        intervals={"base": {"points (0 to 100)": 2.5}},
        best={"points (0 to 100)": ["a|b"]},
    )
    text, html = to_markdown(found), page(found)
    assert "| | base | a\\|b, 1,328 steps |" in text
    assert "| points (0 to 100) | 10.00 ± 2.50 | **1,234.50** |" in text
    assert "interval of 95 %" in text
    assert '<td class="number">10.00 <span class="note">± 2.50</span></td>' in html
    assert '<td class="number best">1,234.50</td>' in html
    assert 'a|b <span class="note">1,328 steps</span></th>' in html
