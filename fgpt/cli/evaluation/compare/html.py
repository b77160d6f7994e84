"""A comparison as one self-contained page of HTML: scores in columns, answers in cards, light or dark.

The templates escape every value (Jinja2's autoescape), and the page forbids scripts and requests.
"""

from pathlib import Path
from typing import Any

from jinja2 import FileSystemLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fgpt.cli.evaluation.compare.results import Comparison, best
from fgpt.cli.evaluation.metrics.text import repeated_ngrams

TEMPLATES = Path(__file__).parent / "templates"

MIN_REPEATS = 30.0
"""Percent of repeated 4-grams from which a card says so."""

MEANINGS = {
    "points": "How much of what the prompts ask for the answers have, as far as the text alone can show it.",
    "FinQA exact match": "FinQA answers whose number is the reference's, to its decimals, or their yes or no.",
    "constraints met": "Share of the constraints in the instructions (in three sentences, as a haiku) that the answers "
    "meet, as far as counting can check it; constraints is the number of them.",
    "response loss": "Of the reference answers, not of those generated here; perplexity is its exponential.",
    "ROUGE-L": "Words shared with the reference answers, in order (F1).",
    "finished with EOS": "Answers that the model ended within the limit of new tokens; the others are truncated.",
    "repeated 4-grams": "Four words in a row that occurred before in the same answer; the mean over answers.",
    "distinct": "Different words, or pairs of words, among those of all answers together; longer answers have fewer.",
    "perplexity of the answers": "Perplexity under the base of the generated answers, given the prompt: far above the "
    "base's own column, a text it would hardly generate; far below, a repetitive one.",
}
"""What the scores mean that have these words in their names."""


def page(comparison: Comparison) -> str:
    """The whole comparison as HTML."""
    return render("comparison.html", title=comparison.title, comparison=comparison)


def render(name: str, folder: Path = TEMPLATES, **values: Any) -> str:
    """A template of `folder`, which may use those of this room, with `values`."""
    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        best=best, color=color, meanings=meanings, min_repeats=MIN_REPEATS, repeated_ngrams=repeated_ngrams
    )
    return environment.get_template(name).render(values)


def meanings(comparison: Comparison) -> list[tuple[str, str]]:
    """What the scores of a comparison mean: words of their names, and the explanation."""
    names = [name for name, _ in comparison.cells()]
    return [(words, text) for words, text in MEANINGS.items() if any(words in name for name in names)]


def color(side: int) -> int:
    """The number of a side's color: 0 for the base, 1 to 5 in turn for the others."""
    return 1 + (side - 1) % 5 if side else 0
