"""Constraints on the number of words, sentences, paragraphs, lines or items, found by patterns.

A pattern matches only what is certain: "about 50 words", "list words of at most 5 letters" and "describe each in one
sentence" ask for nothing that can be counted in the answer as a whole.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from fgpt.cli.evaluation.metrics import answer_parts as parts

ONES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
NUMBERS = {word: n for n, word in enumerate(ONES, 1)} | {"single": 1, "fifteen": 15, "twenty": 20, "fifty": 50}
HOW = {
    "most": r"no more than|not more than|at most|up to|(?:a )?maximum(?: of)?|max|within|no longer than|limited to",
    "less": r"less than|fewer than|under",
    "least": r"at least|(?:a )?minimum of|(?:no|not) (?:less|fewer) than",
    "more": r"more than|over",
    "just": r"exactly|precisely|just|only",
}
N = rf"(?:{'|'.join(NUMBERS)}|\d{{1,4}})"
AMOUNT = (
    rf"(?:(?:{'|'.join(f'(?P<{name}>{words})' for name, words in HOW.items())})\s+)?(?:between\s+)?(?:an?\s+)?"
    rf"(?P<low>{N})(?:\s*(?:-|–|\bto\b|\band\b|\bor\b)\s*(?P<high>{N}))?"
)
TAIL = r"(?:\s+or\s+(?P<tail>less|fewer|under|more))?"
VAGUE = re.compile(
    r"(?:\b(?:about|around|approximately|roughly|nearly|almost|some|the|these|those|first|last|use to|has|had|are)"
    r"|[~-])\s*$"
)
"""Before a number, or before a verb that makes something."""
PER_ITEM = re.compile(r"\b(?:each|every|per|respectively|both|either)\b")
SECOND = re.compile(
    r"\b(?:and|then)\s+(?:then\s+)?(?:explain|describe|identify|translate|discuss|justify|write|list)\b"
)

IN = r"\b(?:(?:in|into|using|with|of|has|have|having|contains?|containing|be)\s+|(?=within\s))"
VERB = (
    r"\b(?:write|compose|create|generate|construct|give|provide|make|come up with|form|draft|produce|craft|suggest"
    r"|think of|brainstorm|compile|prepare|build|propose|offer|recommend|tell|develop|design|devise)(?: me| us)?"
)
MAKE = rf"{VERB}\s+"
ASKED = re.compile(
    rf"{VERB}|\b(?:must|should|needs? to|has to|answer|response|summari[sz]e|describe|explain)\b", re.IGNORECASE
)
"""Without one of these, "of three sentences" describes the material."""
ADJECTIVES = r"(?:\s+(?!(?:of|for|to|in|and|or|from|the|than|with)\b)[a-z-]+){0,2}?\s+"
LISTED = r"\s+(?!(?:star|time|step|day|page|minute|course|way|word|sentence|line)\b)[a-z'-]+"
THINGS = (
    r"(?:examples|ideas|ways|tips|reasons|facts|items|suggestions|recommendations|questions|synonyms|antonyms|adjectives"
    r"|names|titles|benefits|advantages|disadvantages|characteristics|features|uses|topics|strategies|words|keywords"
    r"|headlines|slogans|hashtags|jokes|quotes|activities|goals|factors|things|steps|points|types|kinds|causes|effects)\b"
)


@dataclass(frozen=True)
class Constraint:
    """A condition on an answer as a whole."""

    kind: str
    phrase: str
    """The words of the instruction that state it."""
    met: Callable[[str], bool]
    """Whether an answer meets it."""


class Form(NamedTuple):
    """A way to ask for a number of something; `number` is set if the words have none ("a haiku")."""

    kind: str
    pattern: re.Pattern[str]
    measure: Callable[[str], set[int]]
    number: int | None = None


def _forms() -> Iterator[Form]:
    def form(kind: str, pattern: str, measure: Callable[[str], int | set[int]], number: int | None = None) -> Form:
        def count(text: str) -> set[int]:
            measured = measure(text)
            return measured if isinstance(measured, set) else {measured}

        return Form(kind, re.compile(pattern, re.IGNORECASE), count, number)

    yield form("words", rf"\b{AMOUNT}\s+words?\b{TAIL}(?!\s+(?:that|which|to|from|for|with|starting))", parts.words)
    for name, measure in (("sentence", parts.sentences), ("paragraph", parts.paragraphs)):
        one = rf"{name}\b(?!\s+(?:or|and|of|pair|structure))"
        short = r"(?:short |long |complete |simple |concise |full |brief )?"
        yield form(f"{name}s", rf"{IN}{AMOUNT}\s+{short}{name}s?\b{TAIL}", measure)
        yield form(f"{name}s", rf"{MAKE}{AMOUNT}{ADJECTIVES}{name}s?\b{TAIL}", measure)
        yield form(f"{name}s", rf"{MAKE}(?:an? )?{AMOUNT}(?:-|\s){name}\s+[a-z]+", measure)
        yield form(f"{name}s", rf"(?:\bin |{MAKE})an?{ADJECTIVES}{one}", measure, 1)
    yield form("lines", rf"{IN}{AMOUNT}\s+lines?\b{TAIL}(?!\s+of)", parts.lines)
    yield form("lines", rf"{MAKE}(?:an? )?{AMOUNT}(?:-|\s)line\s+[a-z]+", parts.lines)
    for poem, number in (("haiku", 3), ("limerick", 5), ("quatrain", 4), ("couplet", 2)):
        yield form("lines", rf"{MAKE}(?:an?|one){ADJECTIVES}{poem}\b", parts.lines, number)
    yield form("bullets", rf"\b{AMOUNT}{ADJECTIVES}bullet(?:ed)?[- ](?:points?|items?)\b", parts.num_marked_items)
    yield form("items", rf"(?:^|,|\b(?:and|please|you|to) )\s*(?:list|name)(?: me)?\s+{AMOUNT}{LISTED}", parts.items)
    yield form("items", rf"{MAKE}(?:an?|the){ADJECTIVES}list of (?:the )?(?:top )?{AMOUNT}{LISTED}", parts.items)
    yield form("items", rf"{MAKE}{AMOUNT}{ADJECTIVES}{THINGS}", parts.items)


FORMS = tuple(_forms())
PARTS = {form.kind for form in FORMS} - {"words"}
"""Kinds that cannot be checked together: an answer may have sentences in its items, or lines in its paragraphs."""
BARE_WORDS, MOST_ITEMS = 10, 50
"""More words than these, without an "at most" or the like, are a rough size; more items are no number of items."""


def counts(sentence: str) -> Iterator[Constraint]:
    """The constraints on numbers in a sentence of an instruction."""
    if PER_ITEM.search(sentence.lower()):
        return
    for form in FORMS:
        match = form.pattern.search(sentence)
        if match is None or VAGUE.search(sentence[: match.start()].lower()) or SECOND.search(sentence, match.end()):
            continue
        if re.match(r"of|with|ha|con|be", match[0].lower()) and not ASKED.search(sentence):
            continue
        if form.kind == "items" and match[0].endswith("words") and any(match[name] for name in HOW):
            continue  # at most nine words are no list
        bounds = (form.number, form.number) if form.number is not None else _bounds(match, form.kind)
        if bounds is not None:
            yield Constraint(form.kind, match[0].strip(" ,"), _meets(form.measure, *bounds))


def _meets(count: Callable[[str], set[int]], low: int, high: int) -> Callable[[str], bool]:
    return lambda text: any(low <= n <= high for n in count(text))


def _bounds(match: re.Match[str], kind: str) -> tuple[int, int] | None:
    """The smallest and the largest number that the words allow; None if they are not a clear constraint."""
    low, high = (None if match[name] is None else _number(match[name]) for name in ("low", "high"))
    modifiers = {name for name in HOW if match[name] is not None}
    tail = match.groupdict().get("tail")
    assert low is not None  # the pattern has it
    if high is not None:
        return (low, high) if low < high and not modifiers and tail is None else None
    if modifiers & {"most"} or tail in ("less", "fewer", "under"):
        return 0, low
    if "less" in modifiers:
        return 0, low - 1
    if "least" in modifiers or tail == "more":
        return low, 10**9
    if "more" in modifiers:
        return low + 1, 10**9
    if kind == "words":
        inside = re.search(r"\b(?:in|using|with|write|be)\s+$", match.string[: match.start()].lower())
        return (low, low) if inside and (modifiers or low <= BARE_WORDS) else None
    if kind == "items" and not 2 <= low <= MOST_ITEMS:
        return None
    return low, low


def _number(word: str) -> int:
    return NUMBERS.get(word.lower()) or int(word)
