"""Examples as people can check them: the text of their tokens, with what is trained on in color.

first example, template plain, 61 tokens, loss on 12 (marked):
Instruction: Add 2 and 3.

Response:
«5<|endoftext|>»
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.text import Text

from fgpt.cli.console import console
from fgpt.data.examples import Example
from fgpt.data.truncation import truncate_middle
from fgpt.tokenizers.tokenizer_files import Tokenizer

LOSS = "bold green"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a terminal would obey, or not show."""
OPEN, CLOSE = "«", "»"
"""Around what is trained on, where there are no colors."""
SHORT_PART, SHORT_PARTS = 200, 6
"""Characters of a part of a shortened example, and how many parts it has."""


class Part(NamedTuple):
    """Consecutive tokens of one weight in the loss."""

    tokens: Sequence[int]
    weight: float


def parts(example: Example) -> Iterator[Part]:
    """The parts of an example; their tokens together are its own.

    >>> [part.weight for part in parts(Example.completion((5, 6, 7), prompt_length=1))]
    [0.0, 1.0]
    """
    position = 0
    for start, end, weight in example.spans:
        if start > position:
            yield Part(example.tokens[position:start], 0.0)
        yield Part(example.tokens[start:end], weight)
        position = end
    if position < len(example.tokens):
        yield Part(example.tokens[position:], 0.0)


def text_with_mask(example: Example, tokenizer: Tokenizer, *, colored: bool, short: bool = False) -> Text:
    """The text of an example, with the parts that carry loss in color, or between « and ».

    Args:
        example: The example.
        tokenizer: Its tokenizer.
        colored: By color; a weight other than 1 is written in either case.
        short: Only the beginning and the end of long parts, and of many.
    """
    text = Text()
    of_example = list(parts(example))
    omitted = len(of_example) - SHORT_PARTS if short else 0
    if omitted > 0:
        half = SHORT_PARTS // 2
        shown: list[Part | None] = [*of_example[:half], None, *of_example[-half:]]
    else:
        shown = [*of_example]
    for part in shown:
        if part is None:
            text.append(f"\n[.. {omitted} parts ..]\n", "dim")
            continue
        part_text = CONTROL.sub(
            lambda match: match.group().encode("unicode_escape").decode(), tokenizer.decode(part.tokens)
        )
        if short and len(part_text) > SHORT_PART:
            part_text = "".join(truncate_middle(part_text, SHORT_PART, " [..] "))
        if part.weight == 0:
            text.append(part_text)
            continue
        weight = "" if part.weight == 1 else f"[x {part.weight:g}]"
        text.append(f"{weight}{part_text}" if colored else f"{OPEN}{weight}{part_text}{CLOSE}", LOSS if colored else "")
    return text


def _escape(character: re.Match[str]) -> str:
    return character.group().encode("unicode_escape").decode()


def has_colors() -> bool:
    """Whether the terminal shows colors. NO_COLOR takes them away."""
    return console.is_terminal and not console.no_color and console.color_system is not None


def print_example(title: str, example: Example, tokenizer: Tokenizer, *, short: bool = False) -> None:
    """Print an example under a title that says how much of it is trained on."""
    colored = has_colors()
    marks = "in color" if colored else f"between {OPEN} and {CLOSE}"
    console.print(f"{title}: {len(example.tokens):,} tokens, loss on {example.num_loss_tokens:,} ({marks})")
    console.print(text_with_mask(example, tokenizer, colored=colored, short=short), soft_wrap=True)


def print_first(example: Example, tokenizer: Tokenizer, template: str) -> None:
    """Print the first example that a training has, in a few lines."""
    print_example(f"first example, template {template}", example, tokenizer, short=True)
