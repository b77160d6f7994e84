"""A comparison on one page: scores in columns, answers in cards."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fgpt.cli.evaluation.compare.results import Answer, Comparison
from fgpt.cli.evaluation.metrics.text import repeated_ngrams
from fgpt.cli.pages import render
from fgpt.cli.pages.tables import Cell, Column, Table, text_column

TEMPLATES = Path(__file__).parent / "templates"

MIN_REPEATS = 30.0
"""Percent of repeated 4-grams from which a card says so."""

KINDS = ("points: ", "stories with")
"""How the names of scores of single kinds of tasks begin."""

MEANINGS = {
    "points": "How much of what the prompts ask for the answers have, as far as the text alone can show it.",
    "FinQA exact match": "FinQA answers whose number is the reference's, to its decimals, or their yes or no.",
    "constraints met": "Share of the constraints in the instructions (in three sentences, as a haiku) that the answers "
    "meet, as far as counting can check it.",
    "response loss": "Of the reference answers, not of those generated here; perplexity is its exponential.",
    "ROUGE-L": "Words shared with the reference answers, in order (F1).",
    "finished with EOS": "Answers that the model ended within the limit of new tokens; the others are truncated.",
    "repeated 4-grams": "Four words in a row that occurred before in the same answer; the mean over answers.",
    "distinct": "Different words, or pairs of words, among those of all answers together; longer answers have fewer.",
    "perplexity of the answers": "Perplexity under the base of the generated answers, given the prompt: far above the "
    "base's own column, a text it would hardly generate; far below, a repetitive one.",
}
"""What the scores mean that have these words in their names."""


class Card(NamedTuple):
    """An answer."""

    side: str
    color: str
    text: str
    length: str
    """In tokens, where it is known: compare.json does not hold them."""
    warnings: Sequence[str]


class Prompt(NamedTuple):
    """A prompt, its reference answer, and the answer of each side."""

    instruction: str
    input: str
    reference: str
    cards: Sequence[Card]


@dataclass(frozen=True)
class ComparisonView:
    """What a page shows of a comparison."""

    about: Sequence[str]
    scores: Table
    by_kind: Table
    """Scores of single kinds of tasks."""
    meanings: Sequence[tuple[str, str]]
    """Words in names of scores, and what these mean."""
    prompts: Sequence[Prompt]


def page(comparison: Comparison) -> str:
    """The whole comparison as HTML."""
    view = comparison_view(comparison)
    return render("comparison.html", [TEMPLATES], title=comparison.title, comparison=view)


def comparison_view(comparison: Comparison) -> ComparisonView:
    """What a page shows of a comparison, the base in gray and each other side in a color of its own."""
    prompts = []
    for i, row in enumerate(comparison.rows):
        cards = [
            _card(name, color(side), answers[i]) for side, (name, answers) in enumerate(comparison.answers.items())
        ]
        prompts.append(Prompt(row.instruction, row.input, row.output, cards))
    return ComparisonView(comparison.notes, *_scores(comparison), meanings(comparison), prompts)


def _card(side: str, color: str, answer: Answer) -> Card:
    repeats = repeated_ngrams(answer.text)
    warnings = [] if answer.finished else ["truncated"]
    if repeats >= MIN_REPEATS:
        warnings.append(f"{repeats:.0f} % repeated")
    return Card(side, color, answer.text, f"{len(answer.tokens)} tokens" if answer.tokens else "", warnings)


def _scores(comparison: Comparison) -> tuple[Table, Table]:
    """The scores, and those of single kinds of tasks."""
    heads = [text_column("score")]
    for side, name in enumerate(comparison.sides):
        heads.append(Column(name, color=color(side), note=comparison.steps_of(name)))
    rows: list[list[Cell]] = []
    by_kind: list[list[Cell]] = []
    for name, scores in comparison.cells():
        cells = [Cell(score.value, note=score.margin, is_best=score.is_best) for score in scores]
        (by_kind if name.startswith(KINDS) else rows).append([Cell(name), *cells])
    return Table("scores", heads, rows, is_sortable=False), Table("scores by kind", heads, by_kind, is_sortable=False)


def meanings(comparison: Comparison) -> list[tuple[str, str]]:
    """What the scores of a comparison mean: words of their names, and the explanation."""
    names = [name for name, _ in comparison.cells()]
    return [(words, text) for words, text in MEANINGS.items() if any(words in name for name in names)]


def color(side: int) -> str:
    """The color of a side: gray for the base, five colors in turn for the others.

    >>> [color(side) for side in (0, 1, 5, 6)]
    ['c0', 'c1', 'c5', 'c1']
    """
    return f"c{1 + (side - 1) % 5 if side else 0}"
