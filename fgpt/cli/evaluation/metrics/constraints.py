"""Constraints of an English instruction on the form of its answer, if a text alone can show whether they are met: its
length in words, sentences or items, how it begins and ends, what it contains.

A constraint is recognized only if the instruction states it literally, and for the answer as a whole: rather none than
a wrong one. What follows a colon is material, not a constraint, and so is a question.

These patterns are our own, not lm-eval's `ifeval`: that task brings its own prompts, each with its constraints listed,
while these read the constraints from the instructions of any dataset, and the recorded scores depend on them.
"""

import re
from collections.abc import Sequence

from fgpt.cli.evaluation.metrics.constraint_counts import PARTS, Constraint, counts
from fgpt.cli.evaluation.metrics.constraint_texts import texts
from fgpt.cli.evaluation.metrics.text import mean
from fgpt.data.prompt_templates import InstructionRow

LONG = 150
"""An instruction with more words is mostly material."""
QUOTES = re.compile(r"\"[^\"]*\"|“[^”]*”|(?<!\w)'[^']*'(?!\w)|‘[^’]*’")


def constraints(instruction: str) -> list[Constraint]:
    """The constraints of an instruction, at most one of each kind. If there are several on sentences, paragraphs, lines
    and items, none of these counts, as it is unclear which part of the answer each is for.
    """
    by_kind: dict[str, Constraint] = {}
    for sentence in _sentences(instruction):
        bare = QUOTES.sub(lambda quote: "_" * len(quote[0]), sentence)  # a number in a quotation is not a constraint
        for constraint in (*counts(bare), *texts(sentence)):
            by_kind.setdefault(constraint.kind, constraint)
    several = len(by_kind.keys() & PARTS) > 1
    return [x for kind, x in by_kind.items() if not (several and kind in PARTS)]


def check(row: InstructionRow, text: str) -> list[tuple[Constraint, bool]]:
    """Each constraint of a row's instruction, and whether a text meets it; an empty text meets none."""
    return [(x, bool(text.strip()) and x.met(text)) for x in constraints(row.instruction)]


def score(rows: Sequence[InstructionRow], answers: Sequence[str]) -> dict[str, float]:
    """The share of all constraints that are met, and their number; nothing if the rows have none."""
    met = [is_met for row, text in zip(rows, answers, strict=True) for _, is_met in check(row, text)]
    return {"constraints met (%)": 100 * mean(met), "constraints": len(met)} if met else {}


def _sentences(instruction: str) -> list[str]:
    """The sentences of an instruction that can have a constraint."""
    if len(instruction.split()) > LONG:
        return []
    before_colon = re.split(r":(?=\s|$)", instruction, maxsplit=1)[0]
    parts = [part.strip() for part in re.split(r"(?<=[.!?])[\"'”’]?\s+|\n", before_colon)]
    polite = re.compile(r"(?:please\s+)?(?:can|could|would|will) you\b", re.IGNORECASE)
    statements = [part for part in parts if polite.match(part) or not part.rstrip("\"'”’").endswith("?")]
    return [part for part in statements if part and not re.match(r"(?:I|I['’]m|My|We|He|She|They)\b", part)]
