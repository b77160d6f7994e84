"""Stories as nano's tasks use them: a hero who can be renamed, openings that can be swapped, sentences, facts."""

# ruff: noqa: SIM905  (lists of words read best as lines of words)

import re
from dataclasses import dataclass, replace

HEADS = {
    "Once upon a time, there was": "Once upon a time",
    "Once there was": "Once there was",
    "Long ago, there was": "Long ago",
    "A long time ago, there was": "A long time ago",
    "There once was": "There once was",
    "In a small town, there was": "In a small town",
    "One day,": "One day",
    "One morning,": "One morning",
    "One sunny day,": "One sunny day",
    "One summer day,": "One summer day",
}
"""How a story begins, up to its hero; and the words that an instruction asks for."""

ENDINGS = [
    "The end.",
    "It was the best day ever!",
    "It was a fun day!",
    "What a great day it was!",
    "They were very happy.",
    "And they all lived happily ever after.",
]
"""The first suits every story."""

GIRLS = (
    "Lily Lucy Sue Mia Amy Sally Jane Sarah Daisy Emma Anna Mary Lisa Emily Bella Grace Ella Molly Jill Susie Jenny "
    "Sara Kate Rosie Luna Ellie"
).split()
BOYS = (
    "Tim Tom Max Bob Jack Sam Ben Billy John Leo Joe Andy Mark Benny Timmy Sammy Jerry Freddy Jake Fred Pete James "
    "Bobby Tommy Peter Charlie"
).split()

PEOPLE = "girl boy man lady farmer princess knight".split()
ANIMALS = (
    "fox cat dog bird bunny rabbit bear mouse puppy monkey squirrel duck frog pig kitten panda tiger lion horse "
    "penguin turtle wolf elephant"
).split()
SEA = "fish crab".split()
"""Heroes of their own stories only: a girl's walk in the park is none for a fish."""

_NOT_ADJECTIVES = {"and", "with", "of", "who", "named", "girl", "boy", "mom", "man", "friend", "his", "her", "for"}


@dataclass(frozen=True)
class Tale:
    """`head` `article` `adjectives` `kind` named `name` `rest`, as in "Once upon a time, there was | a | little | girl
    named | Lily | . She loved ..".
    """

    head: str
    article: str
    adjectives: str
    kind: str
    name: str
    rest: str

    @property
    def hero(self) -> str:
        """The hero in the story's words: "a little girl"."""
        return " ".join(part for part in (self.article, self.adjectives, self.kind) if part)

    @property
    def text(self) -> str:
        return f"{self.head} {self.hero} named {self.name}{self.rest}"


_TALE = re.compile(
    r"(?P<head>Once upon a time,? there (?:was|lived)|Once,? there was|There once was|One (?:sunny |summer )?day,"
    r"|One morning,) (?P<article>an?) (?P<adjectives>(?:[a-z]+,? ){0,2})(?P<kind>[a-z]+) (?:named|called) "
    r"(?P<name>[A-Z][a-z]+)(?P<rest>(?=[.,]| [a-z]).*)",
    re.DOTALL,
)


def parse(story: str) -> Tale | None:
    """The tale of a story that opens with one named hero of a kind we know; None for any other story."""
    text = "\n".join(" ".join(line.split()) for line in story.splitlines() if line.strip())
    match = _TALE.fullmatch(text)
    if match is None or not text.isascii() or match["kind"] not in {*PEOPLE, *ANIMALS, *SEA}:
        return None
    adjectives = match["adjectives"].strip()
    if _NOT_ADJECTIVES & set(adjectives.replace(",", "").split()) or re.search(r"\bM(rs?|iss)\b", text):
        return None
    head = (
        match["head"].replace("time there", "time, there").replace("lived", "was").replace("Once, there", "Once there")
    )
    return Tale(head, match["article"], adjectives, match["kind"], match["name"], match["rest"])


def names_for(tale: Tale) -> list[str]:
    """The names that the hero could have, going by the pronouns of the story; none where they disagree."""
    she, he = (len(re.findall(rf"\b(?:{p})\b", tale.rest, re.IGNORECASE)) for p in ("she|her", "he|his|him"))
    if tale.kind in ("girl", "lady", "princess") or (she > 2 * he and tale.kind not in PEOPLE):
        names = GIRLS
    elif tale.kind in ("boy", "man", "farmer", "knight") or he > 2 * she:
        names = BOYS
    else:
        return []
    return [name for name in names if not re.search(rf"\b{name}\b", tale.rest)]


def kinds_for(tale: Tale) -> list[str]:
    """What the hero could be instead, with the same story: a girl or a boy among people could be an animal."""
    if tale.kind not in ("girl", "boy") or re.search(r"\b(?:girls|boys|hands?|hair)\b", tale.rest):
        return []
    return [kind for kind in ANIMALS if kind[0] not in "aeiou" and not re.search(rf"\b{kind}", tale.rest)]


def rename(tale: Tale, name: str) -> Tale:
    return replace(tale, name=name, rest=re.sub(rf"\b{tale.name}\b", name, tale.rest))


def become(tale: Tale, kind: str) -> Tale:
    """The tale with a hero of another kind, whose name for it begins with a consonant."""
    article = tale.article if tale.adjectives else "a"
    return replace(tale, kind=kind, article=article, rest=re.sub(rf"\b{tale.kind}\b", kind, tale.rest))


def heads_for(tale: Tale) -> list[str]:
    """The heads that the rest of the tale can follow: those with "there was" for one with it, else those without."""
    return [head for head in HEADS if head.endswith(",") == tale.head.endswith(",")]


def ends(text: str) -> list[int]:
    """Where the sentences of a text end: a mark outside quotes, before a capital, a quote or nothing."""
    marks = (mark.end() for mark in re.finditer(r"[.!?]+\"?(?=\s+[A-Z\"]|\s*$)", text))
    return [end for end in marks if text.count('"', 0, end) % 2 == 0]


def sentences(text: str) -> list[str]:
    stops = ends(text)
    return [text[i:j].strip() for i, j in zip([0, *stops], stops, strict=False)]


def abridge(tale: Tale, longest: int) -> Tale | None:
    """The tale whole, or its first and last paragraphs, in at most `longest` characters; None where neither will do.

    The last paragraph must speak of the hero and of nobody who came in between.
    """
    paragraphs = tale.rest.split("\n")
    if len(tale.text) <= longest and ends(tale.text)[-1:] == [len(tale.text)]:
        return tale
    if len(paragraphs) > 1 and len(paragraphs[-1]) < 20:  # "The end."
        paragraphs.pop()
    first, last = paragraphs[0], paragraphs[-1]
    short = replace(tale, rest=f"{first}\n{last}")
    whole = all(ends(part)[-1:] == [len(part)] for part in (first, last))
    if len(paragraphs) < 3 or len(short.text) > longest or not whole or last.startswith('"'):
        return None
    # a capital inside a sentence is a name; at its beginning it is one if it is among those that heroes have
    names = {*re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", last), *(set(GIRLS + BOYS) & set(re.findall(r"\w+", last)))}
    return short if tale.name in names and names <= {tale.name, "I", *re.findall(r"\w+", first)} else None


def endings_for(text: str) -> list[str]:
    """The endings that suit a text: glad ones after a glad paragraph, none of "they" where it speaks of one alone."""
    last = text[text.rfind("\n") + 1 :]
    if re.search(r"\b(?:sad|tears|cr(?:y|ied)|scared|angry|hurt|sick|lonely|never)\b", last):
        return ENDINGS[:1]
    several = re.search(r"\b[Tt]hey\b", last) is not None
    return [
        end for end in ENDINGS if (several or "they" not in end.lower()) and (end not in text or text.endswith(end))
    ]


# ------------------------------------------------------------------------------------------------------------- facts


@dataclass(frozen=True)
class Fact:
    """What one sentence says of the hero: a verb as it stands there, and its object."""

    verb: str
    object: str


_PLACES = (
    "park store kitchen beach market river forest zoo lake library garden playground restaurant shop pond farm airport "
    "museum mall sea garage house field yard woods bakery village school bedroom bathroom hospital city town mountain "
    "cave castle circus pool barn room church window door tree hill ocean swing slide fair party"
).replace(" ", "|")
_FEELINGS = (
    "happy sad scared excited surprised hungry tired curious proud angry worried upset lonely bored thirsty brave "
    "nervous glad jealous afraid"
).replace(" ", "|")
_STOP = r"(?=[.,!]| (?:in|on|under|near|by|at|with|and|that|behind|inside|to|for|where|but)\b)"

FACTS = {
    "where": rf"(went) (?:back |out |outside )?(to (?:the|a|his|her|its) (?:[a-z]+ )?(?:{_PLACES})){_STOP}",
    "find": rf"(found|saw|got|made|wanted) (an? (?:[a-z]+,? ){{0,2}}[a-z]+){_STOP}",
    "like": r"(loved|liked|wanted) (to [a-z][^.!?,\"]*)(?=[.!])",
    "feel": rf"(was|felt) (?:very |so |really )?({_FEELINGS})\b",
}

NO_THINGS = {"lot", "bit", "way", "place", "part", "few", "piece", "group", "time", "day", "great", "fun", "own"}


def fact(question: str, tale: Tale, passage: str, sentence: str) -> Fact | None:
    """What `sentence`, the last of the `passage`, tells of the hero in the manner of FACTS[question].

    None where it tells nothing, or where the passage leaves room for a second answer.
    """
    pattern = FACTS[question]
    verbs = pattern[: pattern.index(")") + 1]
    match = re.search(rf"(?:^|, |\band )(?:{tale.name}|[Hh]e|[Ss]he|[Ii]t) {pattern}", sentence)
    if match is None or len(match[2].split()) > 9 or {"it", "them"} & set(match[2].split()):
        return None
    others = _FEELINGS if question == "feel" else f"{verbs} to" if question == "like" else verbs
    if len(re.findall(rf"\b(?:{others})\b", passage)) > 1:
        return None
    if question == "find" and not _thing(match[2], tale.rest):
        return None
    return Fact(match[1], match[2])


def _thing(phrase: str, rest: str) -> bool:
    """Whether a phrase ends in the name of a thing: the story goes on to speak of "the box"."""
    noun = phrase.split()[-1]
    known = re.search(rf"\bthe {noun}\b(?! [a-z]+ed\b)", rest) is not None
    return known and noun not in NO_THINGS and " and " not in phrase and not re.search(r"(?:ing|[^eb]ed)$", noun)


def nouns(text: str) -> list[str]:
    """Words that end a clause after an article or a possessive: things, with few exceptions."""
    words = re.findall(r"\b(?:the|her|his|an?) (?:big |little |red |old |new )?([a-z]{3,})(?=[.,!])", text)
    return [word for word in words if word not in NO_THINGS]
