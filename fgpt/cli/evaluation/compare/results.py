"""The outcome of a comparison: answers and scores by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fgpt.cli.pages.formatting import count
from fgpt.data.prompt_templates import InstructionRow


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: tuple[int, ...]
    """As generated, without EOS."""
    finished: bool
    """Whether the model finished the answer with EOS."""


@dataclass(frozen=True)
class Comparison:
    title: str
    about: Sequence[str]
    """Sentences on how it was done, and on what to bear in mind."""
    rows: Sequence[InstructionRow]
    answers: Mapping[str, Sequence[Answer]]
    """By side, one for each row."""
    scores: Mapping[str, Mapping[str, float]]
    """By side, the same scores for each."""
    settings: Mapping[str, Any]
    steps: Mapping[str, int] = field(default_factory=dict)
    """How long each side was trained, where that is known."""
    intervals: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By side, half of the interval of a score."""
    best: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The best sides of a score, if sides differ by more than chance."""

    @property
    def sides(self) -> list[str]:
        return list(self.answers)

    def cells(self) -> list[tuple[str, list["Score"]]]:
        """Each score: its name, with the number of what it is of where that is known, and its value for each side."""
        rows = []
        first = self.scores[self.sides[0]]
        for name in first:
            if name in COUNTS.values():
                continue
            label = f"{name}, of {first[COUNTS[name]]:,.0f}" if COUNTS.get(name) in first else name
            rows.append((label, [self._score(name, side) for side in self.sides]))
        return rows

    def steps_of(self, side: str) -> str:
        """How long a side was trained, in words; empty if that is not known."""
        return count(self.steps[side], "step") if side in self.steps else ""

    def _score(self, name: str, side: str) -> "Score":
        margin = self.intervals.get(side, {}).get(name)
        return Score(
            f"{self.scores[side][name]:,.2f}",
            "" if margin is None else f"± {margin:,.2f}",
            side in self.best.get(name, ()),
        )

    @property
    def notes(self) -> list[str]:
        """What `about` says, and what the intervals mean."""
        return [*self.about, *([INTERVALS] if any(self.intervals.values()) else [])]


class Score(NamedTuple):
    """A score of one side, as text."""

    value: str
    margin: str
    """Half the interval, after ±; empty if it is not known."""
    is_best: bool


COUNTS = {"constraints met (%)": "constraints", "FinQA exact match (%)": "FinQA rows"}
"""Scores, each with the score that counts what it is of."""
INTERVALS = (
    "± is half an interval of 95 % over the prompts. Where sides differ by more than chance, the best is marked, and "
    "those that cannot be told from it."
)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The content of compare.json."""
    entries = []
    for i, row in enumerate(comparison.rows):
        entry: dict[str, Any] = {"instruction": row.instruction, "input": row.input, "reference": row.output}
        for side, answers in comparison.answers.items():
            entry[side] = {"text": answers[i].text, "finished": answers[i].finished}
        entries.append(entry)
    return {
        "settings": comparison.settings,
        "steps": comparison.steps,
        "scores": comparison.scores,
        "intervals": comparison.intervals,
        "best": comparison.best,
        "answers": entries,
    }
