"""How far an answer does what an instruction of the nano tasks asks, in points from 0 to 100.

A row lists requirements that can be checked on the text alone, so no judge is needed:

    score(answer) = share of its row's requirements met;  score(answers) = 100 · mean over rows
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from fgpt.cli.training.nano_rows import STORY, Task
from fgpt.errors import InputError

FEWEST_WORDS = 30
"""A shorter text is not a story: the instruction itself, repeated, contains every word it asks for."""

FRESH = 0.7
"""Least share of distinct word triples in a story: the training stories have 0.9 and more, a loop has nearly 0."""


@dataclass(frozen=True)
class Score:
    points: float
    """0 to 100."""
    by_requirement: dict[str, float]
    """Percentage of the rows with a requirement in which it is met."""
    by_kind: dict[str, float]
    """Points on the rows of each kind."""


def requirements_met(task: Task, response: str, finished: bool) -> dict[str, bool]:
    """Each requirement of a row, and whether a response meets it. `finished`: whether it ended with EOS.

    A question's answer is compared whole, but for case, punctuation and spacing, and counts only when finished. Of a
    story, being finished is one more requirement, and a text that is not a story (too short, repetitive, or the
    instruction repeated) meets no requirement at all.
    """
    if task.kind != STORY:
        return {"answer": finished and words(response) == words(task.requires["answer"])}
    valid = is_story(response, task.instruction)
    parts = {part: valid and _contains(part, text, response, finished) for part, text in task.requires.items()}
    return parts | {"finished": valid and finished}


def score(tasks: Sequence[Task], responses: Sequence[str], finished: Sequence[bool]) -> Score:
    """Points of one response to each row.

    Raises InputError if there are no rows, or if the three differ in number.
    """
    if not tasks or not len(tasks) == len(responses) == len(finished):
        raise InputError(
            f"expected one response and one finished flag for each of one or more rows; got {len(tasks)} rows, "
            f"{len(responses)} responses, {len(finished)} flags"
        )
    by_requirement: dict[str, list[float]] = defaultdict(list)
    by_kind: dict[str, list[float]] = defaultdict(list)
    for task, response, ended in zip(tasks, responses, finished, strict=True):
        met = requirements_met(task, response, ended)
        by_kind[task.kind].append(100 * sum(met.values()) / len(met))
        for name, is_met in met.items():
            by_requirement[name].append(100.0 * is_met)
    points = [p for of_kind in by_kind.values() for p in of_kind]
    return Score(
        sum(points) / len(points),
        {name: sum(values) / len(values) for name, values in by_requirement.items()},
        {kind: sum(values) / len(values) for kind, values in by_kind.items()},
    )


def is_story(response: str, instruction: str) -> bool:
    """Whether a text could be a story: long enough, not repetitive, and not the instruction repeated."""
    response_words = words(response)
    triples = list(zip(response_words, response_words[1:], response_words[2:], strict=False))
    return (
        len(response_words) >= FEWEST_WORDS
        and len(set(triples)) >= FRESH * len(triples)
        and " ".join(words(instruction)) not in " ".join(response_words)
    )


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"[\w'-]+", text.lower())


def _contains(part: str, required: str, response: str, finished: bool) -> bool:
    response_words, required_words = words(response), words(required)
    if part == "opening":
        return response_words[: len(required_words)] == required_words
    if part == "ending":
        return finished and response_words[-len(required_words) :] == required_words
    return re.search(rf"\b{re.escape(required)}\b", response, 0 if part == "name" else re.IGNORECASE) is not None
