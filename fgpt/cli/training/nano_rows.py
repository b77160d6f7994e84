"""The rows of the nano tasks: instructions whose answers can be checked on the text alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fgpt.data.prompt_templates import InstructionRow
from fgpt.errors import InputError

STORY = "story"
"""The kind of row that asks for a story; every other kind has one right answer."""

PARTS = ("name", "kind", "word", "opening", "ending")
"""What a story can be required to contain, in the order of the instruction."""


@dataclass(frozen=True)
class Task(InstructionRow):
    """A row, and what its answer must contain.

    `requires` maps a part to its text: of a story, any of `PARTS`; of any other kind of row, "answer" alone.
    """

    kind: str = STORY
    requires: Mapping[str, str] = field(default_factory=dict)


def read_tasks(path: Path) -> list[Task]:
    """The rows of a JSON Lines file written by `experiments.nano.make_tasks`.

    Raises InputError for any other file.
    """
    try:
        return [_task(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise InputError(f"{path}: expected rows as experiments.nano.make_tasks writes them: {err!r}") from None


def _task(record: dict[str, Any]) -> Task:
    requires = dict(record["requires"])
    known = set(PARTS) if record["kind"] == STORY else {"answer"}
    if not requires or not requires.keys() <= known or not all(isinstance(text, str) for text in requires.values()):
        raise ValueError(f"a row of kind {record['kind']!r} requires texts for some of {sorted(known)}, got {requires}")
    return Task(record["instruction"], record["input"], record["output"], record["kind"], requires)
