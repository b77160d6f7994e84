"""Counts of the words, sentences, paragraphs, lines and list items of a text."""

import re

MARK = re.compile(
    r"^(?P<indent>\s*)(?:#+\s*|\*\*)*(?:(?P<number>\(?\d{1,2}[.):](?=[\sA-Za-z*]))|[-*–](?=\s)|•)\s*(?=\S)"
)
"""The beginning of a line that is an item."""
INLINE = re.compile(r"(?:^|\s)\(?\d{1,2}[.)]\s+(?=\S)")
ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|No|a\.m|p\.m|U\.S|U\.K|[A-Z])\.(?=\s)")
END = re.compile(r"[.!?…][\"'”’)\]*]*\s+(?=[\"'“‘(\[*]*[A-Z0-9])")


def words(text: str) -> int:
    """The number of parts between white space with a letter or a digit."""
    return sum(any(x.isalnum() for x in word) for word in text.split())


def lines(text: str) -> int:
    """The number of lines that are not blank."""
    return sum(bool(line.strip()) for line in text.splitlines())


def paragraphs(text: str) -> int:
    """The number of parts between blank lines."""
    return sum(bool(part.strip()) for part in re.split(r"\n\s*\n", text))


def sentences(text: str) -> int:
    """The number of sentences: they end at a punctuation mark before a capital or a digit, and at the end of a line."""
    count = 0
    for line in text.splitlines():
        bare = ABBREVIATION.sub(lambda match: match[0][:-1], MARK.sub("", line)).strip()
        count += len([part for part in END.split(bare) if any(x.isalnum() for x in part)])
    return count


def num_marked_items(text: str) -> int:
    """The number of lines marked as items: the numbered ones, or else those with the least indented bullets."""
    marks = [match for line in text.splitlines() if (match := MARK.match(line))]
    if numbered := [match for match in marks if match["number"]]:
        return len(numbered)
    least = min((len(match["indent"]) for match in marks), default=0)
    return sum(len(match["indent"]) == least for match in marks)


def items(text: str) -> set[int]:
    """The number of items of a list. If no line is marked there are several ways to count them, and all are returned:
    lines, paragraphs and sentences, or the parts between commas and a last "and".
    """
    if lines(text) > 1 and (count := num_marked_items(text)):
        return {count}
    if len(INLINE.findall(text)) > 1:
        return {len(INLINE.findall(text))}
    nonblank = [line for line in text.splitlines() if line.strip()]
    counts = {len(nonblank), paragraphs(text), sentences(text)}
    if len(nonblank) > 1:
        return counts | {
            len(nonblank) - nonblank[0].rstrip().endswith(":")
        }  # a line that announces the list is no item
    parts = [part for part in re.split(r"[,;]\s*(?:(?:and|or)\s+)?", text.rpartition(":")[2]) if part.strip()]
    return counts | {len(parts), len(parts) + bool(parts and re.search(r"\s(?:and|or|&)\s", parts[-1]))}
