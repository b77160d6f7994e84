"""Conversations and files of them."""

import json
from pathlib import Path
from typing import Any

from fgpt.data.conversations import (
    Message,
)

SYSTEM = {"role": "system", "content": "Answer in French."}
TALK = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Bonjour."},
    {"role": "user", "content": "Good night."},
    {"role": "assistant", "content": "Bonne nuit."},
]


def write_json_rows(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


def messages_row(*talk: dict[str, Any]) -> tuple[Message, ...]:
    return tuple(Message(each["role"], each["content"]) for each in talk)


ASSISTANT, USER = {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "No?"}
