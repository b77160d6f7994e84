"""What a comparison found: answers and scores by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fgpt.data.prompt_templates import InstructionRow


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: tuple[int, ...]
    """As they were written, the end of text not among them."""
    finished: bool
    """The model ended the answer by itself."""


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
        """Each score: its name, and its value at each side as text."""
        names = list(self.scores[self.sides[0]])
        return [(name, [f"{self.scores[side][name]:,.2f}" for side in self.sides]) for name in names]


MORE = ("points", "stories with", "ROUGE-L", "FinQA exact", "constraints met")
LESS = ("held-out response", "response")
"""How the names of scores begin of which more is better, or less. Of the others neither is by itself: an empty answer
repeats nothing."""


def best(name: str, values: Sequence[str]) -> list[bool]:
    """Which of a score's values, as they are shown, are the best; none where there is no better, or all are alike."""
    numbers = [float(value.replace(",", "")) for value in values]
    choose = max if name.startswith(MORE) else min if name.startswith(LESS) else None
    if choose is None or len(set(numbers)) == 1:
        return [False] * len(values)
    return [number == choose(numbers) for number in numbers]


def as_json(found: Comparison) -> dict[str, Any]:
    """What compare.json holds."""

    def entry(i: int, row: InstructionRow) -> dict[str, Any]:
        told = {side: {"text": some[i].text, "finished": some[i].finished} for side, some in found.answers.items()}
        return {"instruction": row.instruction, "input": row.input, "reference": row.output, **told}

    answers = [entry(i, row) for i, row in enumerate(found.rows)]
    return {"settings": found.settings, "scores": found.scores, "answers": answers}
