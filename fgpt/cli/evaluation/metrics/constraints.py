"""What an instruction demands of its answer's form, where a text alone can show it: its length in words, sentences or
items, how it begins and ends, what it holds.

A demand is found where an instruction states it in so many words, and of the answer as a whole: rather none than a
wrong one. What follows a colon is material and demands nothing, and neither does a question.
"""

import re
from collections.abc import Sequence

from fgpt.cli.evaluation.metrics.constraint_counts import PARTS, Constraint, counts
from fgpt.cli.evaluation.metrics.constraint_texts import texts
from fgpt.cli.evaluation.metrics.text import mean
from fgpt.data.prompt_templates import InstructionRow

LONG = 150
"""An instruction of more words is mostly material."""
QUOTES = re.compile(r"\"[^\"]*\"|“[^”]*”|(?<!\w)'[^']*'(?!\w)|‘[^’]*’")


def constraints(instruction: str) -> list[Constraint]:
    """What an instruction demands, at most one of a kind. Of sentences, paragraphs, lines and items it is one alone,
    for what two of them mean together is not clear.
    """
    found: dict[str, Constraint] = {}
    for sentence in _sentences(instruction):
        bare = QUOTES.sub(lambda quote: "_" * len(quote[0]), sentence)  # a number in a quotation asks for nothing
        for constraint in (*counts(bare), *texts(sentence)):
            found.setdefault(constraint.kind, constraint)
    several = len(found.keys() & PARTS) > 1
    return [x for kind, x in found.items() if not (several and kind in PARTS)]


def checked(row: InstructionRow, text: str) -> list[tuple[Constraint, bool]]:
    """Each demand of a row's instruction, and whether a text meets it; an empty one meets none."""
    return [(x, bool(text.strip()) and x.met(text)) for x in constraints(row.instruction)]


def score(rows: Sequence[InstructionRow], answers: Sequence[str]) -> dict[str, float]:
    """The share of all demands that are met, and how many they are; nothing where the rows state none."""
    met = [is_met for row, text in zip(rows, answers, strict=True) for _, is_met in checked(row, text)]
    return {"constraints met (%)": 100 * mean(met), "constraints": len(met)} if met else {}


def _sentences(instruction: str) -> list[str]:
    """The sentences of an instruction that can ask for something."""
    if len(instruction.split()) > LONG:
        return []
    own = re.split(r":(?=\s|$)", instruction, maxsplit=1)[0]
    parts = [part.strip() for part in re.split(r"(?<=[.!?])[\"'”’]?\s+|\n", own)]
    polite = re.compile(r"(?:please\s+)?(?:can|could|would|will) you\b", re.IGNORECASE)
    told = [part for part in parts if polite.match(part) or not part.rstrip("\"'”’").endswith("?")]
    return [part for part in told if part and not re.match(r"(?:I|I['’]m|My|We|He|She|They)\b", part)]
