"""Labeled texts as tokens: what stands around a text is never cut, and the last token is to tell the class.

    instruction, prefix, text, [separator, second text,] suffix, [end]      -> label

The label is what the last token predicts, a class of a classifier's head or the one token of its name, and so is no
part of the row: its example is `Example(tokens, len(tokens), label)`, and packing, `collate` and `nll` know no more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from fgpt.data.packing import truncate_middle
from fgpt.data.prompt_templates import Example
from fgpt.errors import InputError
from fgpt.rng import fold_in
from fgpt.tokenizers.continuation import continuation
from fgpt.tokenizers.tokenizer_files import Tokenizer

GAP = " ..."
"""What stands where a text has lost its middle."""


@dataclass(frozen=True)
class LabeledText:
    """A text, or a pair of them, and the name of its class (empty when that is to be told)."""

    text: str
    text2: str = ""
    label: str = ""
    where: str = field(default="", compare=False)
    """Where it was read, for errors."""


# -------------------------------------------------------------------------------------------------------------- labels


@dataclass(frozen=True)
class Labels:
    """The classes in their order: that of the run, or sorted, and never that in which the rows name them."""

    names: tuple[str, ...]
    choices: tuple[int, ...]
    """For each class the row of the head that stands for it: the class itself, or the one token of its name."""


def classes(names: Sequence[str]) -> Labels:
    """Labels of a classifier's head: its rows are the classes."""
    return Labels(tuple(names), tuple(range(len(names))))


def verbalizers(names: Sequence[str], tokenizer: Tokenizer) -> Labels:
    """Labels as next tokens: each name, with a space before it, is one token. See `word`.

    Raises InputError where one is several, or two are the same.
    """
    found = [word(name, tokenizer) for name in names]
    for name, tokens in zip(names, found, strict=True):
        if len(tokens) != 1:
            parts = ", ".join(repr(tokenizer.decode([token])) for token in tokens)
            raise InputError(
                f"label {name!r} is {len(tokens)} tokens ({parts}), expected one: give it another word, "
                f"{name}=WORD in `labels`, and name the others too",
                field="labels",
            )
    if twice := [name for i, name in enumerate(names) if found[i] in found[:i]]:
        raise InputError(f"label {twice[0]!r} is the same token as one before it: give it another word")
    return Labels(tuple(names), tuple(tokens[0] for tokens in found))


def word(name: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a label's name where it follows a text and a space: one, if the tokenizer has one for it.

    A tokenizer that puts a space of its own before every text makes two of " yes" alone, and one of it behind a text.
    """
    read = tokenizer.encode
    several = [read(f" {name}"), *(continuation(read, context, f" {name}") for context in (":", "a", "\n"))]
    return next((tokens for tokens in several if len(tokens) == 1), several[1])


def parse_labels(given: Sequence[str]) -> dict[str, str]:
    """Of labels given as "label" or "label=word", what each is called. Raises InputError for two that are the same."""
    pairs = (entry.partition("=") for entry in given)
    words = {label.strip(): word.strip() or label.strip() for label, _, word in pairs}
    if len(set(words.values())) < len(given):
        raise InputError(f"labels {', '.join(given)}: one is there twice, expected each once")
    return words


def apply_labels(words: Mapping[str, str], rows: Sequence[LabeledText]) -> tuple[tuple[str, ...], list[LabeledText]]:
    """The names of the classes, which are the words of the labels, and the rows by these names.

    Raises InputError for fewer than two, and for a row of any other label.
    """
    names = tuple(words.values())
    if len(names) < 2:
        raise InputError(f"labels are {', '.join(names) or 'none'}: expected at least two")
    for row in rows:
        if row.label not in words:
            raise InputError(
                f"{row.where or 'a row'}: label {row.label!r}, expected one of {', '.join(words)}: mend the row, or "
                "name all labels in `labels`",
                field="labels",
            )
    return names, [replace(row, label=words[row.label]) for row in rows]


def resolve_labels(
    given: Sequence[str], train: Sequence[LabeledText], test: Sequence[LabeledText]
) -> tuple[tuple[str, ...], list[LabeledText], list[LabeledText]]:
    """The names of the classes in the order `given`, or sorted where none is, and the rows by these names.

    A label given as "label=word" is called by the word from here on.

    Raises InputError as `words_of` and `named` do, and for a label without a training row.
    """
    found = {row.label for row in train}
    words = parse_labels(given) or {label: label for label in sorted(found)}
    names, rows = apply_labels(words, [*train, *test])
    if absent := [label for label in words if label not in found]:
        raise InputError(f"label {absent[0]!r} has no training row: add some, or leave it out of `labels`", field="labels")
    return names, rows[: len(train)], rows[len(train) :]


def sample_shots(
    rows: Sequence[LabeledText], names: Sequence[str], count: int, rng: torch.Generator
) -> list[LabeledText]:
    """`count` of `rows`, as many of each class as of the next but for one, drawn and mixed by the key.

    Raises InputError where a class has too few.
    """
    order = torch.randperm(len(rows), generator=fold_in(rng, "rows")).tolist()
    by_name = {name: [rows[i] for i in order if rows[i].label == name] for name in names}
    for i, name in enumerate(names):
        wanted = len(range(i, count, len(names)))
        if len(by_name[name]) < wanted:
            raise InputError(
                f"{count} shots want {wanted} of {name!r}, but {len(by_name[name])} are there: lower `num_fewshot`",
                field="num_fewshot",
            )
    taken = [by_name[names[i % len(names)]][i // len(names)] for i in range(count)]
    return [taken[i] for i in torch.randperm(count, generator=fold_in(rng, "order")).tolist()]


# -------------------------------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class PromptWording:
    """The words around a text. Each stretch is tokenized apart: end a prefix with a newline, not with a space."""

    instruction: str = ""
    """Before all else; {labels} in it becomes the labels."""
    prefix: str = ""
    suffix: str = ""


@dataclass(frozen=True)
class PromptFrame:
    """The tokens around the texts of a row. All are attended: a separator or an end is a token like any other."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    gap: tuple[int, ...]


class Encoded(NamedTuple):
    """Examples, and how many of them lost the middle of a text."""

    examples: list[Example]
    num_truncated: int


def prompt_frame(
    wording: PromptWording, names: Sequence[str], tokenizer: Tokenizer, end: bool, shots: Sequence[LabeledText] = ()
) -> PromptFrame:
    """The tokens around every text: with `end`, a last token after it, from which its class is read; `shots` stand
    before it as texts that have their labels. The model's end of text is separator and end; a BOS stands first where
    the model's family has one before every text.
    """

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text)) if text else ()

    prefix, suffix, between = encode(wording.prefix), encode(wording.suffix), (tokenizer.eos,)
    before = tokenizer.prefix_tokens + encode(wording.instruction.replace("{labels}", ", ".join(names)))
    for shot in shots:
        second = (*between, *encode(shot.text2)) if shot.text2 else ()
        before += (*prefix, *encode(shot.text), *second, *suffix, *word(shot.label, tokenizer), *encode("\n\n"))
    return PromptFrame(before + prefix, between, suffix + between if end else suffix, encode(GAP))


def encode(
    rows: Sequence[LabeledText], labels: Labels, around: PromptFrame, tokenizer: Tokenizer, width: int
) -> Encoded:
    """Examples of at most `width` tokens; one without a label has the first as a filler.

    Raises InputError for an empty text, and where `lay` does.
    """
    examples, cut = [], 0
    for row in rows:
        where = f"{row.where}: " if row.where else ""
        if not row.text.strip():
            raise InputError(f"{where}the text is empty: give the row a text")
        texts = [tokenizer.encode(text) for text in (row.text, row.text2) if text]
        try:
            tokens, whole = assemble(texts, around, width)
        except InputError as err:
            raise InputError(f"{where}{err}", err.field) from None
        label = labels.choices[labels.names.index(row.label) if row.label else 0]
        examples.append(Example(tokens, len(tokens), label))
        cut += not whole
    return Encoded(examples, cut)


def assemble(texts: Sequence[Sequence[int]], around: PromptFrame, width: int) -> tuple[tuple[int, ...], bool]:
    """One text or two in their frame, in at most `width` tokens, and whether they are whole.

    A text that is too long loses its middle, and keeps as much of its head as of its tail. Of two, the longer loses
    first, and then both alike. Nothing of the frame is lost.

    Raises InputError where the frame leaves no room, and for a pair of which each alone is longer than the room.
    """
    room = width - len(around.before) - len(around.after) - len(around.between) * (len(texts) - 1)
    lengths = [len(text) for text in texts]
    whole = sum(lengths) <= room
    if not whole and room < (len(around.gap) + 2) * len(texts):
        raise InputError(
            f"the words around a text take {width - room} of {width} tokens, which leaves too few for the text: "
            "shorten them, use fewer shots, or raise `max_seq_len`",
            field="max_seq_len",
        )
    if len(texts) > 1 and min(lengths) > room:
        raise InputError(
            f"both texts are too long, {lengths[0]} and {lengths[1]} tokens where there is room for {room} in all: "
            "shorten one, or raise `max_seq_len` if the model's context allows",
            field="max_seq_len",
        )
    if not whole and len(texts) > 1:
        half = room // 2
        lengths = [room - half, half] if min(lengths) > half else [min(n, room - min(lengths)) for n in lengths]
    elif not whole:
        lengths = [room]
    parts = [_cut(tuple(text), length, around.gap) for text, length in zip(texts, lengths, strict=True)]
    second = [token for part in parts[1:] for token in (*around.between, *part)]
    return (*around.before, *parts[0], *second, *around.after), whole


def _cut(tokens: tuple[int, ...], length: int, gap: tuple[int, ...]) -> tuple[int, ...]:
    if len(tokens) <= length:
        return tokens
    return tuple(truncate_middle(tokens, length - len(gap), gap))
