"""What a text consists of: words, sentences, paragraphs, lines, and items of a list."""

import re

MARK = re.compile(
    r"^(?P<indent>\s*)(?:#+\s*|\*\*)*(?:(?P<number>\(?\d{1,2}[.):](?=[\sA-Za-z*]))|[-*–](?=\s)|•)\s*(?=\S)"
)
"""How the line of an item begins."""
INLINE = re.compile(r"(?:^|\s)\(?\d{1,2}[.)]\s+(?=\S)")
ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|No|a\.m|p\.m|U\.S|U\.K|[A-Z])\.(?=\s)")
END = re.compile(r"[.!?…][\"'”’)\]*]*\s+(?=[\"'“‘(\[*]*[A-Z0-9])")


def words(text: str) -> int:
    """How many stretches between white space have a letter or a digit."""
    return sum(any(x.isalnum() for x in word) for word in text.split())


def lines(text: str) -> int:
    """How many lines are not blank."""
    return sum(bool(line.strip()) for line in text.splitlines())


def paragraphs(text: str) -> int:
    """How many stretches blank lines leave."""
    return sum(bool(part.strip()) for part in re.split(r"\n\s*\n", text))


def sentences(text: str) -> int:
    """How many sentences: they end at a mark that a capital or a digit follows, and with their line."""
    count = 0
    for line in text.splitlines():
        bare = ABBREVIATION.sub(lambda found: found[0][:-1], MARK.sub("", line)).strip()
        count += len([part for part in END.split(bare) if any(x.isalnum() for x in part)])
    return count


def marked(text: str) -> int:
    """How many lines are marked as items: the numbered ones, or else those with the least indented bullets."""
    found = [match for line in text.splitlines() if (match := MARK.match(line))]
    if numbered := [match for match in found if match["number"]]:
        return len(numbered)
    least = min((len(match["indent"]) for match in found), default=0)
    return sum(len(match["indent"]) == least for match in found)


def items(text: str) -> set[int]:
    """How many items a list has. Where no line is marked there are several ways to read it, and so several numbers: its
    lines, paragraphs and sentences, or what commas and a last "and" separate.
    """
    if count := marked(text) if lines(text) > 1 else 0:
        return {count}
    if len(INLINE.findall(text)) > 1:
        return {len(INLINE.findall(text))}
    told = [line for line in text.splitlines() if line.strip()]
    found = {len(told), paragraphs(text), sentences(text)}
    if len(told) > 1:
        return found | {len(told) - told[0].rstrip().endswith(":")}  # what announces the list is none of it
    parts = [part for part in re.split(r"[,;]\s*(?:(?:and|or)\s+)?", text.rpartition(":")[2]) if part.strip()]
    return found | {len(parts), len(parts) + bool(parts and re.search(r"\s(?:and|or|&)\s", parts[-1]))}
