"""Whether an answer to a FinQA question is correct: its number, to as many decimals as the reference has, or yes or no.

No judge is needed, and it is strict: a number of the wrong sign, or of fewer decimals than the reference, is wrong.
"""

import re
from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import NamedTuple

from fgpt.cli.evaluation.metrics.nano import words
from fgpt.cli.evaluation.metrics.text import mean
from fgpt.data.finqa import FinQA
from fgpt.data.prompt_templates import InstructionRow

SCALES = {"thousand": Decimal(10**3), "million": Decimal(10**6), "billion": Decimal(10**9), "trillion": Decimal(10**12)}
DIGITS = 20

NUMBER = re.compile(
    r"""(?P<negative>\(\s*\$?\s*|-\s*\$?\s*|\$\s*-\s*|\$\s*\(\s*)?   # (5), ($ 5), -5, -$5, $-5, $ (5)
    (?<![\w.,])(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?!\w|[.,]\d)
    (?P<percent>\s*(?:%|percent\b|per\s+cent\b))?
    (?P<close>\s*\))?
    (?P<late>\s*(?:%|percent\b))?                                    # (5)%
    (?:\s*\(?\s*(?:in\s+)?(?:\$\s*)?(?P<scale>thousand|million|billion|trillion)s?\b\s*\)?)?""",
    re.VERBOSE | re.IGNORECASE,
)


class Quantity(NamedTuple):
    """A number as written: 5.50 has two decimals."""

    value: Decimal
    percent: bool = False
    scale: Decimal | None = None
    """The value of a "million" or "( in millions )" after it."""


def quantities(text: str) -> list[Quantity]:
    """The numbers of a text, in order, except those with more than `DIGITS` digits. A number in parentheses is
    negative, as reports write it.
    """
    numbers = []
    for match in NUMBER.finditer(text.replace("\u2212", "-")):
        digits, sign = match["digits"].replace(",", ""), match["negative"] or ""
        if len(digits) > DIGITS:
            continue
        negative = ("-" in sign and not _joins(text, match)) or ("(" in sign and match["close"] is not None)
        percent = (match["percent"] or match["late"]) is not None
        scale = None if match["scale"] is None else SCALES[match["scale"].lower()]
        numbers.append(Quantity(-Decimal(digits) if negative else Decimal(digits), percent, scale))
    return numbers


def is_correct(answer: str, reference: str) -> bool:
    """Whether the first line of an answer has the reference's value.

    Of several numbers in it the last that is not a year counts, or else the last. A percent sign may be missing on one
    side, if the number is then the same or its hundredth; so may a "million". A reference without a number is compared
    word by word; yes or no is the answer's first word, or its last.
    """
    line = next((line for line in answer.splitlines() if line.strip()), "")
    reference_words, line_words = words(reference), words(line)
    if reference_words in (["yes"], ["no"]):
        ends = line_words[:1] + line_words[-1:]
        return [word for word in ends if word in ("yes", "no")][:1] == reference_words
    expected, answered = quantities(reference), quantities(line)
    if not expected:
        return bool(reference_words) and line_words == reference_words
    chosen = [x for x in answered if not _is_year(x)] or answered
    return bool(chosen) and _same(chosen[-1], expected[-1])


def score(rows: Sequence[InstructionRow], texts: Sequence[str]) -> dict[str, float]:
    """The share of FinQA rows whose texts are correct, and their number; nothing if no row has a reference answer."""
    pairs = [(x, row.output) for row, x in zip(rows, texts, strict=True) if isinstance(row, FinQA) and row.output]
    if not pairs:
        return {}
    return {"FinQA exact match (%)": 100 * mean([is_correct(*pair) for pair in pairs]), "FinQA rows": len(pairs)}


def _same(x: Quantity, reference: Quantity) -> bool:
    """Whether x, rounded to the reference's decimals, is the reference."""
    values = [x.value]
    if x.percent != reference.percent:
        values.append(x.value / 100 if x.percent else x.value * 100)
    if x.scale is not None and reference.scale is not None:
        values = [value * x.scale / reference.scale for value in values]
    elif x.scale != reference.scale:
        values += [value * x.scale if x.scale else value / (reference.scale or 1) for value in values]
    step = Decimal(1).scaleb(int(reference.value.as_tuple().exponent))
    return any(value.quantize(step, ROUND_HALF_UP) == reference.value for value in values)


def _is_year(x: Quantity) -> bool:
    whole = x.value.as_tuple().exponent == 0
    return whole and not x.percent and x.scale is None and 1900 <= abs(x.value) <= 2099


def _joins(text: str, match: re.Match[str]) -> bool:
    """Whether a number's hyphen joins it to what precedes it, or subtracts it: 2009-2010, 5 - 3; but not 2010 -3."""
    spaced = match["negative"].endswith(" ")
    return re.search(r"[\d)]\s*$" if spaced else r"[\w)]$", text[: match.start()]) is not None
