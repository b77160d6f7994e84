"""Constraints on what an answer begins or ends with, contains or avoids, or is: JSON, capitals, a question.

As with counts, only for the answer as a whole: "list words that start with 'a'" has no constraint of this kind.
"""

import json
import re
from collections.abc import Callable, Iterator

from fgpt.cli.evaluation.metrics.constraint_counts import MAKE, VERB, Constraint

QUOTED = r"(?:\"([^\"]{1,80})\"|“([^”]{1,80})”|(?<!\w)'([^']{1,80})'(?!\w)|‘([^’]{1,80})’)"
TEXT = r"(?:sentence|story|poem|paragraph|essay|letter|email|e-mail|message|tweet|speech|post|review|song)"
YOURS = (
    rf"\b(?:your|the|this|it)(?:\s+(?:answer|response|reply|output|text|{TEXT}))?\s+(?:should|must|has to|needs to)\s+"
)
WRITTEN = (
    rf"{MAKE}(?:an?|one|the)\s+(?:[\w-]+\s+){{0,6}}?{TEXT}\b(?:\s+(?!and\b|then\b)[\w-]+){{0,6}}?\s+"
    r"(?:that\s+|which\s+)?"
)
"""Write a short story about foxes that .."""
FIRST = r"^(?:please\s+)?"
SUBJECT = rf"(?:{FIRST}|{FIRST}(?:start|begin)\b.*\band\s+|{WRITTEN}|{YOURS})"
WITH = r"(?:\s+(?:your|the)\s+[a-z]+)?\s+with\s+(?:the\s+)?(?:words?|phrase|sentence)?\s*"
WORD = r"(?:the\s+)?(?:following\s+)?(?:word|phrase|term|name)s?\s+"
CODE = re.compile(
    r"\b(?:function|program|script|code|command|query|api|python|javascript|java|sql|class|method)\b", re.I
)


def texts(sentence: str) -> Iterator[Constraint]:
    """The constraints in a sentence of an instruction other than those on numbers."""
    for kind, pattern, make in PATTERNS:
        if match := pattern.search(sentence):
            phrases = [x.strip() for x in match.groups() if x]
            yield Constraint(kind, match[0].strip(), make(*phrases))
    if (match := JSON.search(sentence)) and not CODE.search(sentence):
        yield Constraint("json", match[0].strip(), is_json)


def begins(phrase: str) -> Callable[[str], bool]:
    return lambda text: _plain(text).startswith(_plain(phrase))


def ends(phrase: str) -> Callable[[str], bool]:
    return lambda text: _plain(text).endswith(_plain(phrase))


def first_letter(letter: str) -> Callable[[str], bool]:
    return lambda text: _plain(text)[:1] == letter.lower()


def contains(*phrases: str) -> Callable[[str], bool]:
    """A word counts with an ending of up to three letters as well: fox in foxes."""
    return lambda text: all(_find(phrase, text, r"\w{0,3}") for phrase in phrases)


def avoids(*phrases: str) -> Callable[[str], bool]:
    return lambda text: not any(_find(phrase, text, "") for phrase in phrases)


def lower(*_: str) -> Callable[[str], bool]:
    return lambda text: any(x.isalpha() for x in text) and text == text.lower()


def upper(*_: str) -> Callable[[str], bool]:
    return lambda text: any(x.isalpha() for x in text) and text == text.upper()


def asks(*_: str) -> Callable[[str], bool]:
    return lambda text: "?" in text


def is_json(text: str) -> bool:
    """Whether a text is a JSON object or list, in a code fence or without."""
    bare = re.sub(r"^```\w*\n|\n?```$", "", text.strip())
    try:
        return isinstance(json.loads(bare), dict | list)
    except (ValueError, RecursionError):
        return False


def _find(phrase: str, text: str, ending: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(_plain(phrase))}{ending}(?!\w)", _plain(text)) is not None


def _plain(text: str) -> str:
    """In lower case, with plain apostrophes and single spaces, without the marks around it."""
    spaced = " ".join(text.replace("’", "'").replace("‘", "'").lower().split())
    return spaced.strip(" \"'“”.,!?;:*()[]")


JSON = re.compile(
    r"\b(?:in|as|into|to|return|output|using|with)\s+(?:an?\s+)?(?:valid\s+)?JSON\b(?!\s+(?:to|into|file)\b)", re.I
)

SEVERAL = rf"{QUOTED}(?:\s*(?:,|,?\s*and)\s*{QUOTED})?"
ALL = r"\b(?:in|to|use|using|into)\s+(?:all|only|entirely)\s+(?:in\s+)?"
SOME = r"(?:(?!multiple|quiz|exam|test|survey)[\w-]+\s+){0,2}"
PATTERNS: tuple[tuple[str, re.Pattern[str], Callable[..., Callable[[str], bool]]], ...] = tuple(
    (kind, re.compile(pattern, re.IGNORECASE), make)
    for kind, pattern, make in (
        ("begins", rf"{SUBJECT}(?:start|begin)(?:s|n?ing)?{WITH}{QUOTED}", begins),
        ("ends", rf"{SUBJECT}(?:end|finish)(?:s|es|ing)?{WITH}{QUOTED}", ends),
        (
            "first letter",
            rf"{SUBJECT}(?:start|begin)(?:s|n?ing)? with (?:the )?letter ['\"“‘]?([a-z])\b",
            first_letter,
        ),
        (
            "holds",
            rf"(?:{FIRST}(?:include|use|mention)|(?:{WRITTEN}|{YOURS})(?:includ|contain|us|mention|hav|say)(?:e|es|s|ing)?)"
            rf"\s+(?:both\s+)?{WORD}{SEVERAL}",
            contains,
        ),
        (
            "avoids",
            r"\b(?:without\s+(?:using|mentioning|saying)|(?:do not|don't|never|must not|should not|avoid)\s+(?:use"
            rf"|using|mention|mentioning|include|including|contain|say))\s+(?:{WORD})?{SEVERAL}",
            avoids,
        ),
        ("lower case", rf"{ALL}lower[- ]?case\b", lower),
        ("upper case", rf"{ALL}(?:upper[- ]?case|caps|capitals|capital letters)\b", upper),
        (
            "question",
            rf"(?:\b(?:ask|end with|reply with|respond with|pose|formulate)(?: me)?|{VERB})\s+(?:an?|one)\s+{SOME}"
            r"question\b(?!\s*[-/]|\s+(?:and|about the))",
            asks,
        ),
    )
)
