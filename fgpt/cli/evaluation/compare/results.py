"""The outcome of a comparison: answers and scores by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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

    @property
    def sides(self) -> list[str]:
        return list(self.answers)

    def cells(self) -> list[tuple[str, list[str]]]:
        """Each score: its name, and its value for each side as text."""
        names = list(self.scores[self.sides[0]])
        return [(name, [f"{self.scores[side][name]:,.2f}" for side in self.sides]) for name in names]


HIGHER_IS_BETTER = ("points", "stories with", "ROUGE-L", "FinQA exact", "constraints met")
LOWER_IS_BETTER = ("held-out response", "response")
"""How the names of such scores begin. The others are neither: an empty answer repeats nothing."""


def best(name: str, values: Sequence[str]) -> list[bool]:
    """Which values of a score, as text, are the best; none if the score has no better, or if all values are equal."""
    numbers = [float(value.replace(",", "")) for value in values]
    if len(set(numbers)) == 1 or not name.startswith(HIGHER_IS_BETTER + LOWER_IS_BETTER):
        return [False] * len(values)
    optimum = max(numbers) if name.startswith(HIGHER_IS_BETTER) else min(numbers)
    return [number == optimum for number in numbers]


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The content of compare.json."""
    entries = []
    for i, row in enumerate(comparison.rows):
        entry: dict[str, Any] = {"instruction": row.instruction, "input": row.input, "reference": row.output}
        for side, answers in comparison.answers.items():
            entry[side] = {"text": answers[i].text, "finished": answers[i].finished}
        entries.append(entry)
    return {"settings": comparison.settings, "scores": comparison.scores, "answers": entries}
