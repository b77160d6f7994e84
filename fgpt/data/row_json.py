r"""Rows as lines of JSON, and back.

>>> row_to_json(InstructionRow("Say hi.", output="Hi."))
'{"class": "InstructionRow", "instruction": "Say hi.", "input": "", "output": "Hi."}'
>>> row_from_json(row_to_json(InstructionRow("Say hi.", output="\ud83d")))
InstructionRow(instruction='Say hi.', input='', output='\ud83d')
"""

import dataclasses
import json
from typing import Any

from fgpt.data.conversations import Message
from fgpt.data.finqa import FinQA
from fgpt.data.rows import ConversationRow, InstructionRow, TextRow, Turn

CLASSES: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (InstructionRow, ConversationRow, FinQA, TextRow, Turn, Message)
}
"""The classes of rows, and of what is in their fields. A sequence in a field is a tuple."""


def row_to_json(row: InstructionRow) -> str:
    """Raises TypeError for a row whose class is not in `CLASSES`."""
    return json.dumps(row, default=_fields)


def row_from_json(text: str) -> InstructionRow:
    """The row that `row_to_json` wrote."""
    return json.loads(text, object_hook=_build)


def _fields(value: Any) -> dict[str, Any]:
    if CLASSES.get(name := type(value).__name__) is not type(value):
        raise TypeError(f"{name} is not in CLASSES")
    return {"class": name} | {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _build(fields: dict[str, Any]) -> Any:
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    return CLASSES[values.pop("class")](**values)
