"""Evaluation sets of an instruction tuning: rows that each have a name and a loss of their own."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fgpt.cli.console import console
from fgpt.cli.metrics_log import HELDOUT_LOSS, eval_loss
from fgpt.data import packing
from fgpt.data.examples import Example
from fgpt.data.prompt_templates import InstructionRow, Template, encode_to_score
from fgpt.data.source_syntax import parse_source
from fgpt.errors import InputError, short_repr
from fgpt.tokenizers.tokenizer_files import Tokenizer

NAME = re.compile(r"[\w.-]+")


def parse_eval_data(eval_data: Sequence[str]) -> dict[str, str]:
    """The source of each evaluation set, by its name: what is before `=`, or else the file's name without its ending.

    Raises InputError for a name that occurs twice, for one that is not of letters, digits, `_`, `.` and `-`, and for a
    weight.

    >>> parse_eval_data(["news=a/b.jsonl", "chat.json[:100]"])
    {'news': 'a/b.jsonl', 'chat': 'chat.json[:100]'}
    """
    sources: dict[str, str] = {}
    for text in eval_data:
        name, equals, source = text.partition("=")
        if not equals or Path(text).exists():
            name, source = Path(parse_source(text).name).name.partition(".")[0], text
        if not NAME.fullmatch(name) or not source:
            raise InputError(
                f"--eval-data {short_repr(text)}: expected FILE or NAME=FILE, with a name of letters, digits, _, -, ."
            )
        if parse_source(source).weight is not None:
            raise InputError(f"--eval-data {short_repr(text)}: a set is evaluated whole: leave out the weight")
        if name in sources:
            raise InputError(
                f"--eval-data has two sets named {name}, {sources[name]} and {source}: give each another name, "
                "NAME=FILE"
            )
        sources[name] = source
    return sources


def encode_eval_sets(
    heldout: Sequence[InstructionRow],
    eval_sets: Mapping[str, Sequence[InstructionRow]],
    *,
    template: Template,
    tokenizer: Tokenizer,
    max_seq_len: int,
) -> dict[str, list[Example]]:
    """The examples of each loss of an evaluation, by the name of its metric: held-out rows, if any fits, come first.

    Raises InputError for an evaluation set of which no row fits.
    """
    examples: dict[str, list[Example]] = {}
    if heldout_examples := fitting_examples("held-out rows", heldout, template, tokenizer, max_seq_len):
        examples[HELDOUT_LOSS] = heldout_examples
    for name, rows in eval_sets.items():
        examples[eval_loss(name)] = fitting_examples(name, rows, template, tokenizer, max_seq_len)
        if not examples[eval_loss(name)]:
            raise InputError(
                f"evaluation set {name}: none of its {len(rows)} rows has a response and at most {max_seq_len} tokens; "
                "give other rows, or raise --max-seq-len"
            )
    return examples


def fitting_examples(
    name: str, rows: Sequence[InstructionRow], template: Template, tokenizer: Tokenizer, max_seq_len: int
) -> list[Example]:
    """The examples whose loss is computed: those of at most `max_seq_len` tokens that have a response. How many were
    left out is printed.
    """
    examples = encode_to_score(rows, template, tokenizer, max_seq_len)
    is_long, is_empty = packing.unusable(examples, max_seq_len)
    fitting = [example for example, unusable in zip(examples, is_long | is_empty, strict=True) if not unusable]
    if len(fitting) < len(examples):
        console.print(
            f"{name}: of {len(examples):,} rows {is_long.sum():,} are longer than {max_seq_len} tokens and "
            f"{is_empty.sum():,} have no response: its loss leaves them out",
            markup=False,
        )
    return fitting
