"""How far an answer does what nano's instruction asks, in points from 0 to 100.

A row lists requirements that can be checked on the text alone, so no judge is needed:

    score(answer) = share of its row's requirements met;  score(answers) = 100 · mean over rows
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fgpt.data.prompt_templates import InstructionRow
from fgpt.errors import InputError

STORY = "story"
"""The kind of row that asks for a story; every other kind has one right answer."""

PARTS = ("name", "kind", "word", "opening", "ending")
"""What a story can be asked to hold, in the order it is asked for."""

FEWEST_WORDS = 30
"""A shorter text is no story: the instruction itself, said back, holds every word it asks for."""

FRESH = 0.7
"""Least share of distinct word triples in a story: the stories trained on have 0.9 and more, a loop has next to 0."""


@dataclass(frozen=True)
class Task(InstructionRow):
    """A row, and what its answer must hold.

    `requires` maps a part to its text: of a story, any of `PARTS`; of any other kind of row, "answer" alone.
    """

    kind: str = STORY
    requires: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    points: float
    """0 to 100."""
    by_requirement: dict[str, float]
    """Share of the rows that ask for it in which it is met, in percent."""
    by_kind: dict[str, float]
    """Points on the rows of a kind."""


def requirements_met(task: Task, response: str, finished: bool) -> dict[str, bool]:
    """Each requirement of a row, and whether a response meets it. `finished`: the model ended the response by itself.

    A question's answer is compared whole, but for case, punctuation and spacing, and counts only when finished. Of a
    story, being finished is one requirement more, and a text that is none (too short, going in circles, or saying the
    instruction back) meets no requirement at all.
    """
    if task.kind != STORY:
        return {"answer": finished and words(response) == words(task.requires["answer"])}
    told = is_story(response, task.instruction)
    parts = {part: told and _holds(part, text, response, finished) for part, text in task.requires.items()}
    return parts | {"finished": told and finished}


def score(tasks: Sequence[Task], responses: Sequence[str], finished: Sequence[bool]) -> Score:
    """Points of one response to each row.

    Raises InputError without rows, or where the three do not match in number.
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
    points = [p for some in by_kind.values() for p in some]
    return Score(
        sum(points) / len(points),
        {name: sum(some) / len(some) for name, some in by_requirement.items()},
        {kind: sum(some) / len(some) for kind, some in by_kind.items()},
    )


def is_story(response: str, instruction: str) -> bool:
    """Whether a text could be a story at all: long enough, not in circles, and not the instruction said back."""
    said = words(response)
    triples = list(zip(said, said[1:], said[2:], strict=False))
    return (
        len(said) >= FEWEST_WORDS
        and len(set(triples)) >= FRESH * len(triples)
        and " ".join(words(instruction)) not in " ".join(said)
    )


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"[\w'-]+", text.lower())


def _holds(part: str, wanted: str, response: str, finished: bool) -> bool:
    said, asked = words(response), words(wanted)
    if part == "opening":
        return said[: len(asked)] == asked
    if part == "ending":
        return finished and said[-len(asked) :] == asked
    return re.search(rf"\b{re.escape(wanted)}\b", response, 0 if part == "name" else re.IGNORECASE) is not None


def read_tasks(path: Path) -> list[Task]:
    """The rows of a JSON lines file that `make_nano_tasks` wrote.

    Raises InputError for a file that is not one.
    """
    try:
        return [_task(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise InputError(f"{path}: expected rows as experiments.nano.make_tasks writes them: {err!r}") from None


def _task(record: dict[str, Any]) -> Task:
    asked = dict(record["requires"])
    known = set(PARTS) if record["kind"] == STORY else {"answer"}
    if not asked or not asked.keys() <= known or not all(isinstance(text, str) for text in asked.values()):
        raise ValueError(f"a row of kind {record['kind']!r} requires texts for some of {sorted(known)}, got {asked}")
    return Task(record["instruction"], record["input"], record["output"], record["kind"], asked)
