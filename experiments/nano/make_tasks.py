"""Make nano's instructions from stories: the rows that `just train lora-nano` trains on, and the rows held out.

    python -m experiments.nano.make_tasks OUT_FOLDER --stories TEXT [TEXT ..] --held-out TEXT

`fgpt/nano/tasks.jsonl` and `fgpt/nano/heldout.jsonl` were made so from stories that pretrained nano and from
stories it never saw (half a minute). Every choice is a hash of what it is for, so the same stories give the same rows.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from experiments.nano import tales
from experiments.nano.tales import Tale
from fgpt.cli.evaluation.metrics.nano import requirements_met
from fgpt.cli.training.nano_rows import STORY, Task
from fgpt.data import documents
from fgpt.errors import InputError
from fgpt.io.files import write

T = TypeVar("T")

SHARES = {
    "where": 0.06,
    "find": 0.06,
    "title": 0.05,
    "feel": 0.04,
    "like": 0.06,
    "repeat": 0.05,
    "what": 0.06,
    "who": 0.07,
    STORY: 0.55,
}
"""Share of the rows by kind, rarest material first: each story makes one row at most."""

SAME = dict.fromkeys(SHARES, 0.08) | {"feel": 0.12}
"""Largest share of a kind's rows with one and the same answer (stories: hero), so that no constant answer scores.
Feelings are few.
"""

LONGEST = 460
"""Characters of a story to be written; some 115 tokens."""

LONGEST_INPUT = 230

COMMON = (0.003, 0.08)
"""A word to be used stands in this share of the stories: rarer ones a small model has hardly met, commoner ones come
unasked.
"""


def pick(options: Sequence[T], *why: object) -> T:
    """One of the options, by a hash of `why`."""
    return options[draw(*why) % len(options)]


def draw(*why: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(why).encode(), digest_size=6).digest(), "big")


def chance(share: float, *why: object) -> bool:
    return draw(*why) < share * 2**48


# ----------------------------------------------------------------------------------------------------------- stories

ABOUT = {
    ("kind", "name"): (
        "Write a story about a {kind} named {name}.",
        "Tell a story about a {kind} named {name}.",
        "Write a short story about a {kind} called {name}.",
        "Tell me a story about {name} the {kind}.",
        "Make up a story. It is about a {kind} named {name}.",
    ),
    ("name",): ("Write a story about {name}.", "Tell a story about {name}.", "Tell me a short story about {name}."),
    ("kind",): (
        "Write a story about a {kind}.",
        "Tell a story about a {kind}.",
        "Tell me a short story about a {kind}.",
    ),
}
ASK = {
    "word": (
        'Use the word "{word}".',
        'Put the word "{word}" in it.',
        'The story must have the word "{word}".',
        'It must say "{word}".',
    ),
    "opening": ('Begin with "{opening}".', 'Start with "{opening}".', 'The first words are "{opening}".'),
    "ending": ('End with "{ending}"', 'The last words are "{ending}"', 'Finish with "{ending}"'),
}


def story(tale: Tale, common: set[str], i: int) -> Task | None:
    """An instruction to write a story, with the tale, in short, as its answer; None where it cannot be shortened."""
    short = tales.abridge(tale, LONGEST)
    if short is None:
        return None
    parts = pick([("kind", "name")] * 3 + [("name",), ("kind",)], i, "about")
    requires = {"kind": short.kind, "name": short.name}
    requires = {part: requires[part] for part in parts}
    nouns = [word for word in tales.nouns(short.rest) if word in common and word != short.kind]
    if nouns and chance(0.8, i, "word"):
        requires["word"] = pick(nouns, i, "which word")
    if chance(0.5, i, "opening"):
        short = replace(short, head=pick(tales.heads_for(short), i, "which opening"))
        requires["opening"] = tales.HEADS[short.head]
    text = short.text
    if chance(0.5, i, "ending"):
        text = text.removesuffix("The end.").rstrip()
        requires["ending"] = pick(tales.endings_for(text), i, "which ending")
        text = text if text.endswith(requires["ending"]) else f"{text} {requires['ending']}"
    phrases = [pick(ABOUT[parts], i, "phrase"), *(pick(ASK[part], i, part) for part in ASK if part in requires)]
    instruction = _articles(" ".join(phrases).format(**requires))
    return Task(instruction, "", text, STORY, requires)


# --------------------------------------------------------------------------------------------- questions and the rest

QUESTIONS = {
    "who": (
        "Who is the story about?",
        "What is the name of the {kind}?",
        "Who is it about?",
        "What is the {kind} called?",
    ),
    "what": ("What is {name}?", "Who or what is {name}?", "Tell me what {name} is."),
    "where": ("Where did {name} go?", "Tell me where {name} went.", "What place did {name} go to?"),
    "find": ("What did {name} {verb}?", "Tell me what {name} {past}.", "What is the thing that {name} {past}?"),
    "like": ("What did {name} {verb} to do?", "Tell me what {name} {past} to do."),
    "feel": ("How did {name} feel?", "What did {name} feel?", "Tell me how {name} felt."),
    "title": ("Give the story a title.", "What is a good title for the story?", "Name the story."),
    "repeat": ("Repeat the first sentence.", "Write the first sentence again.", "Say the first sentence again."),
}
_VERBS = {
    "found": "find",
    "saw": "see",
    "got": "get",
    "made": "make",
    "wanted": "want",
    "loved": "love",
    "liked": "like",
}


def question(kind: str, tale: Tale, i: int) -> Task | None:
    """A question on the tale's first sentences, in `input`, that they answer in one way; None where they do not."""
    first_sentences = tales.sentences(tale.text)[:4]
    if kind in ("who", "what", "repeat"):
        length, verb = pick([1, 2, 3] if kind != "repeat" else [2, 3], i, "length"), ""
        if (
            len(first_sentences) < length
            or len(re.findall(r"\b(?:named|called)\b", " ".join(first_sentences[:length]))) > 1
        ):
            return None
        answer = {"who": f"{tale.name}.", "what": f"{tale.hero.capitalize()}.", "repeat": first_sentences[0]}[kind]
        if len(answer) > 110:
            return None
    else:
        for length in range(1, len(first_sentences) + 1):
            pattern = "find" if kind == "title" else kind
            fact = tales.fact(pattern, tale, " ".join(first_sentences[:length]), first_sentences[length - 1])
            if fact is not None:
                break
        else:
            return None
        verb, object_ = fact.verb, fact.object
        if kind == "title":
            answer = f"{tale.name} and the {object_.split()[-1].capitalize()}"
        else:
            answer = f"{object_[0].upper()}{object_[1:]}."
    passage = " ".join(first_sentences[:length])
    if len(passage) > LONGEST_INPUT or '"' in passage:
        return None
    phrase = pick(QUESTIONS[kind], i, "phrase")
    instruction = phrase.format(name=tale.name, kind=tale.kind, verb=_VERBS.get(verb, ""), past=verb)
    return Task(instruction, passage, answer, kind, {"answer": answer})


def _articles(text: str) -> str:
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


# ------------------------------------------------------------------------------------------------------- the mixture


def recast(tale: Tale, i: int) -> Tale | None:
    """The tale with another name for its hero, and an animal for two thirds of the girls and boys.

    Two names and two kinds lead nine stories in ten; a constant answer would do well among them. None for a hero who
    can have no other name.
    """
    names, kinds = tales.names_for(tale), tales.kinds_for(tale)
    if tale.kind in ("girl", "boy") and not kinds and chance(0.67, i, "people"):
        return None
    if kinds and chance(0.67, i, "animal"):
        tale = tales.become(tale, pick(kinds, i, "which animal"))
    return tales.rename(tale, pick(names, i, "which name")) if names else None


def common_words(stories: Sequence[str]) -> set[str]:
    counts = Counter(word for text in stories for word in set(re.findall(r"\b[a-z]+\b", text)))
    low, high = (share * len(stories) for share in COMMON)
    return {word for word, count in counts.items() if low <= count <= high}


def candidates(stories: Sequence[str]) -> list[tuple[int, Tale]]:
    """Recast tales with the hashes that choose for them, in the order of those."""
    parsed = [(draw(text, "story"), tales.parse(text)) for text in dict.fromkeys(stories)]
    cast = [(i, recast(tale, i)) for i, tale in parsed if tale is not None]
    return sorted(((i, tale) for i, tale in cast if tale is not None), key=lambda pair: pair[0])


def make(stories: Sequence[str], count: int, common: set[str], exclude: Sequence[Task] = ()) -> list[Task]:
    """`count` rows in the mixture of `SHARES`, none with the prompt, the input or the story of one of `exclude`.

    Raises InputError if the stories do not make that many.
    """
    pool = candidates(stories)
    counts = {kind: round(share * count) for kind, share in SHARES.items()}
    counts[STORY] += count - sum(counts.values())
    tasks: list[Task] = []
    used: set[int] = set()
    used_marks = {mark for task in exclude for mark in _marks(task)}
    for kind, number in counts.items():
        repeats, of_kind = Counter[str](), list[Task]()
        whole_first = sorted(pool, key=lambda pair: kind == STORY and len(pair[1].text) > LONGEST)
        for i, tale in whole_first:
            if len(of_kind) == number:
                break
            task = None if i in used else story(tale, common, i) if kind == STORY else question(kind, tale, i)
            if task is None or used_marks & _marks(task):
                continue
            same = tale.kind if kind == STORY else task.output
            if repeats[same] >= max(1, SAME[kind] * number):
                continue
            if not all(requirements_met(task, task.output, finished=True).values()):
                continue  # a repetitive story; asserted of all rows below
            repeats[same] += 1
            used.add(i)
            used_marks |= _marks(task)
            of_kind.append(task)
        if len(of_kind) < number:
            raise InputError(
                f"the stories make {len(of_kind)} rows of kind {kind!r}, expected {number}: give more stories, or ask "
                "for fewer rows"
            )
        tasks += of_kind
    assert all(all(requirements_met(task, task.output, finished=True).values()) for task in tasks)
    return sorted(tasks, key=lambda task: draw(task.instruction, task.input))


def _marks(task: Task) -> set[str]:
    """What no two rows may share: the prompt, and a story's text wherever it stands."""
    return {f"{task.instruction}\n{task.input}", task.output if task.kind == STORY else task.input}


def lines(tasks: Sequence[Task]) -> str:
    """The rows as JSON Lines; `fgpt.cli.training.nano_rows.read_tasks` reads them."""
    return "".join(json.dumps(asdict(task), ensure_ascii=False) + "\n" for task in tasks)


def main(
    out: Annotated[Path, tyro.conf.Positional],
    stories: tuple[Path, ...],
    held_out: Path,
    rows: int = 1500,
    held_out_rows: int = 110,
) -> None:
    """Write tasks.jsonl and heldout.jsonl into a folder. Raises InputError, having written nothing.

    Args:
        stories: texts to make the training rows of.
        held_out: a text to make the held-out rows of.
    """
    texts = [text for path in stories for text in documents.read(path)]
    common = common_words(texts)
    heldout_tasks = make(documents.read(held_out), held_out_rows, common)
    tasks = make(texts, rows, common, exclude=heldout_tasks)
    write(out / "heldout.jsonl", lines(heldout_tasks))
    write(out / "tasks.jsonl", lines(tasks))


if __name__ == "__main__":
    tyro.cli(main)
