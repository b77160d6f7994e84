"""Labeled texts as tokens: the prompt around a text is never truncated, and the last token predicts the class.

    instruction, prefix, text, [separator, second text,] suffix, [eos]      -> label

The label is what the last token predicts: a class of a classification head, or the one token of the class's name. It is
not part of the example's tokens, which are `Example.classification(tokens, label)`, so packing, `collate` and `nll`
treat these examples as any others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from fgpt.data.examples import Example
from fgpt.data.truncation import truncate_middle
from fgpt.errors import InputError
from fgpt.rng import fold_in
from fgpt.tokenizers.continuation import continuation_tokens
from fgpt.tokenizers.tokenizer_files import Tokenizer

ELLIPSIS = " ..."
"""Replaces the removed middle of a text."""


@dataclass(frozen=True)
class LabeledText:
    """A text, or a pair of texts, and the name of its class (empty if it is to be predicted)."""

    text: str
    text2: str = ""
    label: str = ""
    where: str = field(default="", compare=False)
    """Its position in the source, for error messages."""
    number: int = field(default=0, compare=False)
    """Its number among the rows of the source, from 1."""


# -------------------------------------------------------------------------------------------------------------- labels


@dataclass(frozen=True)
class Labels:
    """The classes in their order, which is the recipe's or sorted, and never the order of the examples."""

    names: tuple[str, ...]
    output_ids: tuple[int, ...]
    """For each class, its index in the model's output: the class itself, or the token of its name."""


def class_labels(names: Sequence[str]) -> Labels:
    """Labels for a classification head, whose outputs are the classes.

    >>> class_labels(["no", "yes"])
    Labels(names=('no', 'yes'), output_ids=(0, 1))
    """
    return Labels(tuple(names), tuple(range(len(names))))


def verbalizers(names: Sequence[str], tokenizer: Tokenizer) -> Labels:
    """Labels as next tokens: each name, after a space, is one token. See `label_tokens`.

    Raises:
        InputError: if a name is several tokens, or two names are the same token.
    """
    encoded = [label_tokens(name, tokenizer) for name in names]
    for name, tokens in zip(names, encoded, strict=True):
        if len(tokens) != 1:
            parts = ", ".join(repr(tokenizer.decode([token])) for token in tokens)
            raise InputError(
                f"label {name!r} is {len(tokens)} tokens ({parts}), expected one: give it another word, "
                f"{name}=WORD in `labels`, and name the others too",
                field="labels",
            )
    if repeated := [name for i, name in enumerate(names) if encoded[i] in encoded[:i]]:
        raise InputError(f"label {repeated[0]!r} is the same token as one before it: give it another word")
    return Labels(tuple(names), tuple(tokens[0] for tokens in encoded))


def label_tokens(name: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a label's name after a text and a space: a single one, if the tokenizer has one for it.

    A tokenizer that inserts a space before every text makes two tokens of " yes" alone, and one of it after a text.
    """
    after_a_text = (continuation_tokens(tokenizer.encode, context, f" {name}") for context in (":", "a", "\n"))
    candidates = [tokenizer.encode(f" {name}"), *after_a_text]
    return next((tokens for tokens in candidates if len(tokens) == 1), candidates[1])


def parse_labels(labels: Sequence[str]) -> dict[str, str]:
    """The word for each label, from labels written as "label" or "label=word".

    Raises:
        InputError: if two are the same.

    >>> parse_labels(["0=no", "1=yes", "maybe"])
    {'0': 'no', '1': 'yes', 'maybe': 'maybe'}
    """
    pairs = (entry.partition("=") for entry in labels)
    words = {label.strip(): word.strip() or label.strip() for label, _, word in pairs}
    if len(set(words.values())) < len(labels):
        raise InputError(f"labels {', '.join(labels)}: one is there twice, expected each once")
    return words


def apply_labels(words: Mapping[str, str], rows: Sequence[LabeledText]) -> tuple[tuple[str, ...], list[LabeledText]]:
    """The names of the classes, which are the words of the labels, and the rows with these names as their labels.

    Raises:
        InputError: for fewer than two classes, and for a row with any other label.
    """
    names = tuple(words.values())
    if len(names) < 2:
        raise InputError(f"labels are {', '.join(names) or 'none'}: expected at least two")
    for row in rows:
        if row.label not in words:
            raise InputError(
                f"{row.where or 'a row'}: label {row.label!r}, expected one of {', '.join(words)}: fix the row, or "
                "name all labels in `labels`",
                field="labels",
            )
    return names, [replace(row, label=words[row.label]) for row in rows]


def resolve_labels(
    labels: Sequence[str], train: Sequence[LabeledText], test: Sequence[LabeledText]
) -> tuple[tuple[str, ...], list[LabeledText], list[LabeledText]]:
    """The names of the classes, and the training and test rows with these names as their labels.

    Args:
        labels: The labels in their order, as `parse_labels` takes them; if empty, those of `train`, sorted.
        train: Training rows.
        test: Test rows.

    Raises:
        InputError: as `parse_labels` and `apply_labels` do, and for a label without a training row.
    """
    train_labels = {row.label for row in train}
    words = parse_labels(labels) or {label: label for label in sorted(train_labels)}
    names, rows = apply_labels(words, [*train, *test])
    if absent := [label for label in words if label not in train_labels]:
        raise InputError(
            f"label {absent[0]!r} has no training row: add some, or leave it out of `labels`", field="labels"
        )
    return names, rows[: len(train)], rows[len(train) :]


def sample_shots(
    rows: Sequence[LabeledText], names: Sequence[str], num_shots: int, rng: torch.Generator
) -> list[LabeledText]:
    """Few-shot examples in random order, the same number of each class up to one.

    Args:
        rows: The rows to sample from.
        names: The names of the classes.
        num_shots: The number of examples.
        rng: The key of the sample.

    Raises:
        InputError: if a class has too few rows.
    """
    order = torch.randperm(len(rows), generator=fold_in(rng, "rows")).tolist()
    by_class = {name: [rows[i] for i in order if rows[i].label == name] for name in names}
    for i, name in enumerate(names):
        required = len(range(i, num_shots, len(names)))
        if len(by_class[name]) < required:
            raise InputError(
                f"{num_shots} shots need {required} of {name!r}, but there are {len(by_class[name])}: lower "
                "`num_fewshot`",
                field="num_fewshot",
            )
    shots = [by_class[names[i % len(names)]][i // len(names)] for i in range(num_shots)]
    return [shots[i] for i in torch.randperm(num_shots, generator=fold_in(rng, "order")).tolist()]


# -------------------------------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class PromptWording:
    """The words around a text. Each part is tokenized on its own: end a prefix with a newline, not with a space."""

    instruction: str = ""
    """The beginning of the prompt; {labels} in it becomes the labels."""
    prefix: str = ""
    suffix: str = ""


@dataclass(frozen=True)
class PromptFrame:
    """The tokens around the texts of an example. All are attended to, separator and end-of-sequence included."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    ellipsis: tuple[int, ...]


class EncodedTexts(NamedTuple):
    """Examples, and the number of them with a truncated text."""

    examples: list[Example]
    num_truncated: int


def prompt_frame(
    wording: PromptWording,
    names: Sequence[str],
    tokenizer: Tokenizer,
    append_eos: bool,
    shots: Sequence[LabeledText] = (),
) -> PromptFrame:
    """The tokens around every text.

    Args:
        wording: The words of the prompt.
        names: The names of the classes.
        tokenizer: The model's; its end-of-sequence token also separates two texts, and its prefix, such as a BOS token,
            begins the prompt.
        append_eos: End with an end-of-sequence token, from which a head predicts the class.
        shots: Few-shot examples, placed before the text with their labels.
    """

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text)) if text else ()

    prefix, suffix, between = encode(wording.prefix), encode(wording.suffix), (tokenizer.eos_token_id,)
    before = tokenizer.prefix_tokens + encode(wording.instruction.replace("{labels}", ", ".join(names)))
    for shot in shots:
        second = (*between, *encode(shot.text2)) if shot.text2 else ()
        label = label_tokens(shot.label, tokenizer)
        before += (*prefix, *encode(shot.text), *second, *suffix, *label, *encode("\n\n"))
    after = suffix + between if append_eos else suffix
    return PromptFrame(before + prefix, between, after, encode(ELLIPSIS))


def encode(
    rows: Sequence[LabeledText], labels: Labels, frame: PromptFrame, tokenizer: Tokenizer, max_seq_len: int
) -> EncodedTexts:
    """Labeled texts as examples, and how many of them were truncated.

    Args:
        rows: The texts; one without a label gets the first class as a placeholder.
        labels: The classes.
        frame: The tokens around each text.
        tokenizer: The model's.
        max_seq_len: The maximum number of tokens of an example.

    Raises:
        InputError: for an empty text, and as `assemble` does.
    """
    examples, num_truncated = [], 0
    for row in rows:
        where = f"{row.where}: " if row.where else ""
        if not row.text.strip():
            raise InputError(f"{where}the text is empty: give the row a text")
        texts = [tokenizer.encode(text) for text in (row.text, row.text2) if text]
        try:
            tokens, complete = assemble(texts, frame, max_seq_len)
        except InputError as err:
            raise InputError(f"{where}{err}", err.field) from None
        label = labels.output_ids[labels.names.index(row.label) if row.label else 0]
        examples.append(Example.classification(tokens, label))
        num_truncated += not complete
    return EncodedTexts(examples, num_truncated)


def assemble(texts: Sequence[Sequence[int]], frame: PromptFrame, max_seq_len: int) -> tuple[tuple[int, ...], bool]:
    """One text or two in their frame, and whether the texts are complete.

    A text that is too long loses its middle, and keeps as much of its beginning as of its end. Of two texts, the longer
    is truncated first, and then both equally. The frame is never truncated.

    Args:
        texts: The tokens of one text or two.
        frame: The tokens around them.
        max_seq_len: The maximum number of tokens.

    Raises:
        InputError: if the frame leaves no space, or each of two texts alone is longer than the space.

    >>> frame = PromptFrame(before=(1,), between=(0,), after=(2,), ellipsis=(9,))
    >>> assemble([[5, 6, 7, 8, 5, 6]], frame, max_seq_len=7)
    ((1, 5, 6, 9, 5, 6, 2), False)
    """
    space = max_seq_len - len(frame.before) - len(frame.after) - len(frame.between) * (len(texts) - 1)
    lengths = [len(text) for text in texts]
    complete = sum(lengths) <= space
    if not complete and space < (len(frame.ellipsis) + 2) * len(texts):
        raise InputError(
            f"the words around a text take {max_seq_len - space} of {max_seq_len} tokens, which leaves too few for the "
            "text: shorten them, use fewer shots, or raise `max_seq_len`",
            field="max_seq_len",
        )
    if len(texts) > 1 and min(lengths) > space:
        raise InputError(
            f"both texts are too long: {lengths[0]} and {lengths[1]} tokens, with space for {space} in all: shorten "
            "one, or raise `max_seq_len` if the model's context allows",
            field="max_seq_len",
        )
    if not complete:
        lengths = _truncated_lengths(lengths, space)
    parts = [_truncate(tuple(text), length, frame.ellipsis) for text, length in zip(texts, lengths, strict=True)]
    second = [token for part in parts[1:] for token in (*frame.between, *part)]
    return (*frame.before, *parts[0], *second, *frame.after), complete


def _truncated_lengths(lengths: list[int], space: int) -> list[int]:
    """How many tokens of one text or two fit."""
    if len(lengths) == 1:
        return [space]
    half = space // 2
    if min(lengths) > half:
        return [space - half, half]
    return [min(length, space - min(lengths)) for length in lengths]


def _truncate(tokens: tuple[int, ...], length: int, ellipsis: tuple[int, ...]) -> tuple[int, ...]:
    if len(tokens) <= length:
        return tokens
    return tuple(truncate_middle(tokens, length - len(ellipsis), ellipsis))
