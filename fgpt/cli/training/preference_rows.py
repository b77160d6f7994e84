"""The rows of preference tuning and of reward models: pairs, or judged answers, and their tokens."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from fgpt.cli.console import console
from fgpt.cli.training.examples import num_heldout, source_weights, train_heldout_split, warn_of_repeats
from fgpt.cli.training.preference_batches import PreferenceExamples
from fgpt.data.conversations import Message
from fgpt.data.examples import Example
from fgpt.data.preferences import Judgment, Preference, check_labels, read_judgments, read_preferences
from fgpt.data.prompt_templates import Template, encode
from fgpt.data.rows import InstructionRow, Turn, conversation_row
from fgpt.errors import InputError
from fgpt.recipes import PreferenceRecipe, RewardRecipe
from fgpt.tokenizers.tokenizer_files import Tokenizer

Row: TypeAlias = Preference | Judgment
HELD_OUT = "held-out "
"""What messages call rows that are not trained on, and may be of one label."""


def load_split(recipe: PreferenceRecipe | RewardRecipe, judged: bool = False) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out: pairs, or `judged` answers. The format of each source is printed.

    Raises InputError as the readers do, for weights of sources, and for judged answers of one label.
    """
    names = [name for name, weight in source_weights(recipe.data) if weight is None]
    if len(names) < len(recipe.data):
        raise InputError("--data has weights, and preferences are not mixed by weights: leave them out")
    read = read_judgments if judged else read_preferences
    rows: list[Row] = []
    for name in names:
        of_source = read(name, recipe.columns)
        rows += of_source.rows
        console.print(of_source.format, markup=False, soft_wrap=True)
    warn_of_repeats(names, recipe.num_heldout)
    check_labels([row for row in rows if isinstance(row, Judgment)], ", ".join(names))
    return train_heldout_split(rows, num_heldout(rows, recipe.num_heldout, ", ".join(recipe.data)), recipe.seed)


def prompt_of(row: Row) -> tuple[Message, ...]:
    """The messages before the answer, none of which is trained on."""
    messages = row.prompt if isinstance(row, Preference) else row.messages
    return tuple(replace(message, weight=0.0) for message in messages)


def chosen_row(row: Row) -> InstructionRow:
    """The prompt with its chosen answer; a judged answer is no reference, and left out."""
    answer = "\n\n".join(message.content for message in row.chosen) if isinstance(row, Preference) else ""
    prompt = prompt_of(row)
    return Turn(prompt[-1].content, "", answer, prompt)


def mismatched_answer(rows: Sequence[Row], i: int) -> tuple[Message, ...]:
    """The answer of the next row with another prompt; of the next row, if all prompts are one."""
    prompt = prompt_of(rows[i])
    following = (rows[j] for j in itertools.chain(range(i + 1, len(rows)), range(i)))
    row = next((other for other in following if prompt_of(other) != prompt), rows[(i + 1) % len(rows)])
    assert isinstance(row, Judgment)
    return row.answer


def encode_rows(
    recipe: PreferenceRecipe | RewardRecipe,
    rows: Sequence[Row],
    prompt_template: Template,
    tokenizer: Tokenizer,
    max_seq_len: int,
    which: str = "",
) -> PreferenceExamples:
    """The rows as tokens. How many are left out because an answer is too long is printed.

    Raises InputError if one is and the recipe's `overlong` is "error", and if none remains.
    """

    def example(row: Row, answer: Sequence[Message]) -> Example:
        return encode(conversation_row((*prompt_of(row), *answer), row.where), prompt_template, tokenizer)

    chosen: list[Example] = []
    rejected: list[Example] = []
    labels: list[bool] = []
    number_long = 0
    for i, row in enumerate(rows):
        if isinstance(row, Preference):
            both = example(row, row.chosen), example(row, row.rejected)
        else:
            both = example(row, row.answer), example(row, mismatched_answer(rows, i))
        if max(len(x.tokens) for x in both) > max_seq_len:
            number_long += 1
            if recipe.overlong == "error":
                raise InputError(
                    f"{row.where}: an answer ends after {max_seq_len} tokens: shorten it, raise --max-seq-len, or give "
                    "--overlong drop"
                )
            continue
        chosen.append(both[0])
        rejected.append(both[1])
        labels += [row.label] if isinstance(row, Judgment) else []
    if number_long:
        console.print(f"left out {number_long} {which}rows with an answer beyond {max_seq_len} tokens")
    if rows and not chosen:
        raise InputError(f"no {which}row fits {max_seq_len} tokens: raise --max-seq-len")
    if labels and which != HELD_OUT and len(set(labels)) == 1:
        kind = "good" if labels[0] else "bad"
        raise InputError(
            f"all {len(labels):,} answers that are left to train on are {kind}: expected both kinds; give more rows, "
            "or lower --num-heldout"
        )
    return PreferenceExamples(chosen, rejected, tuple(labels) if labels else None)
