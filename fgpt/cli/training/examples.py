"""The rows that a fine-tuning recipe trains on, and the rows held out of them."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch

from fgpt.cli.console import console
from fgpt.cli.training.conversation_rows import loss_rows, report_templates
from fgpt.cli.training.eval_sets import parse_eval_data
from fgpt.cli.training.nano_rows import read_tasks
from fgpt.cli.training.tokenizer import load_tokenizer
from fgpt.data import classification_datasets, conversations, finqa, instruction_datasets
from fgpt.data.classification_prompts import LabeledText
from fgpt.data.mixtures import check_weights
from fgpt.data.prompt_templates import encode, template
from fgpt.data.rows import InstructionRow, turns_of
from fgpt.data.source_syntax import parse_source
from fgpt.errors import InputError
from fgpt.io import models
from fgpt.recipes import ClassificationRecipe, InstructionRecipe
from fgpt.rng import fold_in, key

T = TypeVar("T")

NANO_TASKS, NANO_HELDOUT = models.EMBEDDED["nano"] / "tasks.jsonl", models.EMBEDDED["nano"] / "heldout.jsonl"


class InstructionSplit(NamedTuple):
    """The rows of an instruction tuning."""

    rows: list[InstructionRow]
    """To train on, source by source."""
    heldout: list[InstructionRow]
    sizes: tuple[int, ...]
    """How many of `rows` each source has."""


def load_instruction_split(recipe: InstructionRecipe) -> InstructionSplit:
    """Rows to train on and rows held out: the embedded data's own split, or the last of a shuffle by the recipe's seed.
    A conversation is one row to train on; held out, it is a row for each of its answers. What is left out of
    conversations is counted and printed, as is the number of FinQA pages that were shortened to `max_seq_len`.

    Raises InputError if holding out would leave nothing to train on.
    """
    if recipe.data == ("nano",):
        rows: list[InstructionRow] = list(read_tasks(NANO_TASKS))
        return InstructionSplit(rows, list(read_tasks(NANO_HELDOUT)), (len(rows),))
    by_source = [rows for _, rows in load_source_rows(recipe)]
    rows = loss_rows(recipe, list(itertools.chain.from_iterable(by_source)))
    report_templates(recipe, rows)
    count = num_heldout(rows, recipe.num_heldout, ", ".join(recipe.data))
    heldout = heldout_indices(len(rows), count, recipe.seed)
    sizes: list[int] = []
    for start, end in itertools.pairwise(itertools.accumulate(map(len, by_source), initial=0)):
        sizes.append(sum(i not in heldout for i in range(start, end)))
    train, second = _split(rows, heldout)
    return InstructionSplit(train, turns_of(second), tuple(sizes))


def load_eval_sets(recipe: InstructionRecipe) -> dict[str, list[InstructionRow]]:
    """The rows of each evaluation set, by its name, a row for each answer of a conversation. Raises InputError as
    `parse_eval_data` does, and for a source that cannot be read.
    """
    sources = parse_eval_data(recipe.eval_data)
    return {name: turns_of(_load_rows(recipe, [source])[0]) for name, source in sources.items()}


def source_weights(sources: Sequence[str]) -> list[tuple[str, float | None]]:
    """Each source of `--data` and its weight in the mixture, None if it has none.

    Raises InputError as `check_weights` does.

    >>> source_weights(["alpaca:0.7", "mine.jsonl:0.3"])
    [('alpaca', 0.7), ('mine.jsonl', 0.3)]
    """
    parsed = [parse_source(text) for text in sources]
    weights = [(str(replace(source, weight=None)), source.weight) for source in parsed]
    check_weights(weights)
    return weights


def load_source_rows(recipe: InstructionRecipe) -> list[tuple[str, list[InstructionRow]]]:
    """The name and the rows of each source. What is left out or shortened is printed.

    Raises InputError as `instruction_datasets.load_each` does.
    """
    if recipe.data == ("nano",):
        return [("nano", list(read_tasks(NANO_TASKS)))]
    names = [name for name, _ in source_weights(recipe.data)]
    return list(zip(names, _load_rows(recipe, names), strict=True))


def _load_rows(recipe: InstructionRecipe, sources: Sequence[str]) -> list[list[InstructionRow]]:
    """The rows of each source."""
    columns = None if recipe.columns == instruction_datasets.Columns() else recipe.columns
    loaded = list(instruction_datasets.load_each(sources, columns))
    for each in loaded:
        for line in each.formats:
            console.print(line, markup=False)
    if reasons := conversations.summary(sum((each.left_out for each in loaded), Counter[str]())):
        console.print(f"left out: {reasons}", markup=False)
    return [_shorten_finqa(recipe, each.rows) for each in loaded]


def _shorten_finqa(recipe: InstructionRecipe, rows: list[InstructionRow]) -> list[InstructionRow]:
    """The rows, FinQA's pages without as much of their text as does not fit."""
    if not any(isinstance(row, finqa.FinQA) for row in rows):
        return rows
    cfg, tokenizer, _ = load_tokenizer(recipe)
    max_seq_len, prompt_template = min(recipe.max_seq_len, cfg.n_ctx), template(recipe.template)

    def length(row: InstructionRow) -> int:
        example = encode(row, prompt_template, tokenizer)
        return max(len(example.tokens), example.prompt_length + finqa.ANSWER_TOKENS)

    shortened_rows, count = finqa.shorten(rows, max_seq_len, length)
    if count:
        console.print(f"shortened the text of {count:,} FinQA rows to {max_seq_len} tokens; their tables are complete")
    return shortened_rows


def load_classification_split(recipe: ClassificationRecipe) -> tuple[list[LabeledText], list[LabeledText]]:
    """Rows to train on and rows to score: those of `test`; for a dataset of the hub its own test split, if it has one;
    else the last of a shuffle by the recipe's seed.

    Raises InputError if holding out would leave nothing to train on.
    """
    columns = _classification_columns(recipe)
    rows = classification_datasets.load_labeled_texts(recipe.train, "train", columns)
    if (test := _test_source(recipe)) is not None:
        return rows, classification_datasets.load_labeled_texts(test, "test", columns)
    if recipe.num_heldout < 1:
        raise InputError(
            f"--num-heldout {recipe.num_heldout}: expected 1 or more rows to score, or other rows with --test"
        )
    return train_heldout_split(rows, num_heldout(rows, recipe.num_heldout, recipe.train), recipe.seed)


def load_test_texts(recipe: ClassificationRecipe) -> list[LabeledText]:
    """The rows to score alone. Raises InputError as `load_classification_split` does."""
    if (test := _test_source(recipe)) is None:
        return load_classification_split(recipe)[1]
    return classification_datasets.load_labeled_texts(test, "test", _classification_columns(recipe))


def _test_source(recipe: ClassificationRecipe) -> str | None:
    """The source of the rows to score; None if they are held out of those to train on."""
    return recipe.test or (recipe.train if classification_datasets.has_test_split(recipe.train) else None)


def _classification_columns(recipe: ClassificationRecipe) -> classification_datasets.Columns | None:
    return None if recipe.columns == classification_datasets.Columns() else recipe.columns


def num_heldout(rows: Sequence[object], requested: float, source: str) -> int:
    """How many rows to hold out: `requested`, below 1 that fraction of the rows; a tenth of the rows if that would be
    more than half of them.

    Raises InputError if there is only one row.
    """
    count = max(1, round(requested * len(rows))) if 0 < requested < 1 else round(requested)
    if 2 * count <= len(rows):
        return count
    if len(rows) < 2:
        raise InputError(f"{source} has {len(rows)} rows: expected 2 or more, one of them to be held out; add some")
    count = max(1, len(rows) // 10)
    console.print(
        f"held out {count:,} of {len(rows):,} rows, a tenth: --num-heldout {requested} would be more than half",
        markup=False,
    )
    return count


def train_heldout_split(rows: Sequence[T], heldout: int, seed: int) -> tuple[list[T], list[T]]:
    """All rows except `heldout` of them, and those: each part in the rows' order."""
    return _split(rows, heldout_indices(len(rows), heldout, seed))


def _split(rows: Sequence[T], heldout: set[int]) -> tuple[list[T], list[T]]:
    return [row for i, row in enumerate(rows) if i not in heldout], [rows[i] for i in sorted(heldout)]


def heldout_indices(num_rows: int, heldout: int, seed: int) -> set[int]:
    """The indices of the rows to hold out: the last `heldout` of a shuffle by the seed. At least one row is left."""
    order = torch.randperm(num_rows, generator=fold_in(key(seed), "heldout")).tolist()
    return set(order[max(1, num_rows - heldout) :])
