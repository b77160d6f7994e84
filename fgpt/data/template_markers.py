"""Prompts that hold a prompt template already, around which another would be put."""

from collections import Counter
from collections.abc import Iterable

from fgpt.data.rows import ConversationRow, InstructionRow, TextRow

MARKERS = (
    *("### Instruction:", "### Response:", "<|im_start|>", "<|im_end|>", "[INST]", "<|user|>", "<|assistant|>"),
    *("<|start_header_id|>", "<start_of_turn>", "\n\nAssistant:"),
)
"""What prompt templates are known by."""


def count_markers(rows: Iterable[InstructionRow]) -> Counter[str]:
    """The number of rows whose first prompt holds each marker.

    >>> count_markers([InstructionRow("### Instruction: Add."), InstructionRow("Add.")])
    Counter({'### Instruction:': 1})
    """
    return Counter(marker for row in rows for marker in MARKERS if marker in _first_prompt(row))


def _first_prompt(row: InstructionRow) -> str:
    if isinstance(row, TextRow):
        return ""
    if isinstance(row, ConversationRow):
        return next((message.content for message in row.messages if message.role == "user"), "")
    return row.instruction
