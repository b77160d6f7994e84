"""The rows that a fine-tuning recipe trains on, and the rows held out of them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from fgpt.cli.console import console
from fgpt.cli.training.job import tokenizer_contents
from fgpt.cli.training.nano_rows import read_tasks
from fgpt.cli.training.token_cache import TokenizedSource
from fgpt.cli.training.tokenized_sources import stored_rows, tokenized_source
from fgpt.data import classification_datasets, conversations, instruction_datasets, packing
from fgpt.data.classification_prompts import LabeledText
from fgpt.data.example_store import StoredExamples, StoredRows, bounds, example_batch
from fgpt.data.examples import Example
from fgpt.data.pieces import encode_pieces
from fgpt.data.prompt_templates import InstructionRow, Turn, pieces, template
from fgpt.data.tokenization import Encoding, shorten_pages
from fgpt.errors import InputError
from fgpt.io import models
from fgpt.recipes import ClassificationRecipe, InstructionRecipe
from fgpt.rng import fold_in, key

T = TypeVar("T")

NANO = ("nano",)
NANO_TASKS, NANO_HELDOUT = models.EMBEDDED["nano"] / "tasks.jsonl", models.EMBEDDED["nano"] / "heldout.jsonl"


class SourceRange(NamedTuple):
    """Where the examples of a source are among all that are trained on: from `start` to `stop`, excluded."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class InstructionData:
    """What a recipe trains on, and what it holds out."""

    examples: Sequence[Example]
    """They have answers and fit a row."""
    heldout: list[InstructionRow]
    sources: tuple[SourceRange, ...]
    """In the order of the recipe's `data`."""


def load_instruction_data(recipe: InstructionRecipe) -> InstructionData:
    """Examples to train on and rows held out: the embedded data's own split, or the last of a shuffle by the recipe's
    seed. What is left out of conversations is counted and printed, as are pages of FinQA that were shortened to
    `max_seq_len`, and rows that are longer or have no response.

    Raises InputError if holding out would leave nothing to train on, and for a longer row if the recipe's `overlong` is
    "error".
    """
    cfg, tokenizer = models.load_config_and_tokenizer(recipe.base)
    encoding = Encoding(template(recipe.template), tokenizer, min(recipe.max_seq_len, cfg.n_ctx))
    if recipe.data == NANO:
        tasks = read_tasks(NANO_TASKS)
        texts = [pieces(row, encoding.template, tokenizer) for row in tasks]
        batch = example_batch(encode_pieces(texts, tokenizer), range(len(tasks)))
        stored, starts = StoredExamples.from_batches([batch]), np.array([0])
        heldout: list[InstructionRow] = [*read_tasks(NANO_HELDOUT)]
    else:
        tokenized = _tokenized_sources(recipe, encoding)
        _print_left_out(sum((source.left_out for source in tokenized), Counter[str]()))
        _print_shortened(sum(source.num_shortened for source in tokenized), encoding.max_seq_len)
        stored = StoredExamples.from_batches([batch for source in tokenized for batch in source.examples])
        rows = [StoredRows(source.rows) for source in tokenized]
        first_rows = bounds([len(source) for source in rows])
        starts = bounds([sum(batch.num_rows for batch in source.examples) for source in tokenized])[:-1]
        numbers = stored.rows + np.repeat(first_rows[:-1], np.diff([*starts, len(stored)]))
        is_heldout = _heldout_rows(recipe, _groups(recipe, [source.groups for source in rows]))
        heldout = _rows_at(rows, first_rows, np.flatnonzero(is_heldout))
        training = np.flatnonzero(~is_heldout[numbers])
        stored, starts = stored.take(training), np.searchsorted(training, starts)
    examples, usable = _fit(recipe, stored, encoding.max_seq_len)
    edges = [*np.searchsorted(usable, starts).tolist(), len(examples)]
    ranges = zip(recipe.data, edges[:-1], edges[1:], strict=True)
    return InstructionData(examples, heldout, tuple(SourceRange(*each) for each in ranges))


def load_heldout_rows(recipe: InstructionRecipe) -> list[InstructionRow]:
    """The rows of `load_instruction_data` that are held out. Others are neither tokenized nor kept: tokens that are not
    cached are not made.
    """
    if recipe.data == NANO:
        return [*read_tasks(NANO_HELDOUT)]
    cfg, tokenizer = models.load_config_and_tokenizer(recipe.base)
    encoding = Encoding(template(recipe.template), tokenizer, min(recipe.max_seq_len, cfg.n_ctx))
    contents = tokenizer_contents(recipe.base)
    sources, left_out = [], Counter[str]()
    for name in recipe.data:
        source = stored_rows(name, _columns(recipe, name), encoding, contents)
        left_out += source.left_out
        sources.append(source)
    _print_left_out(left_out)
    rows = [source.rows for source in sources]
    first_rows = bounds([len(source) for source in rows])
    is_heldout = _heldout_rows(recipe, _groups(recipe, [source.groups for source in sources]))
    chosen, _ = shorten_pages(_rows_at(rows, first_rows, np.flatnonzero(is_heldout)), encoding)
    return chosen


def _tokenized_sources(recipe: InstructionRecipe, encoding: Encoding) -> list[TokenizedSource]:
    """Those of the recipe, in order; one that is named twice is read once."""
    contents, by_name = tokenizer_contents(recipe.base), dict[str, TokenizedSource]()
    for name in recipe.data:
        if name not in by_name:
            by_name[name] = tokenized_source(name, _columns(recipe, name), encoding, contents)
    return [by_name[name] for name in recipe.data]


def _columns(recipe: InstructionRecipe, source: str) -> instruction_datasets.Columns | None:
    columns = None if recipe.columns == instruction_datasets.Columns() else recipe.columns
    return instruction_datasets.columns_of(source, recipe.data, columns)


def _print_left_out(left_out: Counter[str]) -> None:
    if reasons := conversations.summary(left_out):
        console.print(f"left out of conversations: {reasons}", markup=False)


def _print_shortened(count: int, max_seq_len: int) -> None:
    if count:
        console.print(f"shortened the text of {count:,} FinQA rows to {max_seq_len} tokens; their tables are complete")


def _fit(recipe: InstructionRecipe, examples: StoredExamples, max_seq_len: int) -> tuple[Sequence[Example], np.ndarray]:
    """Those that can be trained on, of at most `max_seq_len` tokens, and their indices. How many were truncated or left
    out is printed.

    Raises InputError for a longer row if the recipe's `overlong` is "error".
    """
    if recipe.overlong == "cut":
        examples, truncated = examples.truncate(max_seq_len)
        if truncated:
            console.print(f"truncated {truncated} responses of rows longer than {max_seq_len} tokens")
    usable, dropped = packing.usable_indices(examples, max_seq_len, recipe.overlong != "error")
    if dropped.long or dropped.empty:
        console.print(
            f"left out {dropped.long} rows longer than {max_seq_len} tokens and {dropped.empty} without a response"
        )
    return examples.take(usable), usable


def _groups(recipe: InstructionRecipe, of_sources: Sequence[np.ndarray]) -> np.ndarray:
    """The number of the group of each row of all sources; a row of group -1 is a group by itself. A source that is
    named twice has the same groups both times.
    """
    first_groups = dict[str, int]()
    total, groups = 0, [np.empty(0, np.int64)]
    for name, local in zip(recipe.data, of_sources, strict=True):
        if name not in first_groups:
            first_groups[name] = total
            total += int(local.max(initial=-1)) + 1
        groups.append(np.where(local < 0, -1, local + first_groups[name]))
    joined = np.concatenate(groups)
    alone = joined < 0
    joined[alone] = total + np.arange(alone.sum())
    return joined


def _heldout_rows(recipe: InstructionRecipe, groups: np.ndarray) -> np.ndarray:
    count = num_heldout(range(len(groups)), recipe.num_heldout, ", ".join(recipe.data))
    return heldout_mask(groups, count, recipe.seed)


def _rows_at(
    sources: Sequence[Sequence[InstructionRow]], first_rows: np.ndarray, numbers: np.ndarray
) -> list[InstructionRow]:
    """The rows of those numbers, which count through all sources."""
    rows: list[InstructionRow] = []
    for number in numbers.tolist():
        source = int(np.searchsorted(first_rows, number, "right")) - 1
        rows.append(sources[source][number - int(first_rows[source])])
    return rows


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


def num_heldout(rows: Sequence[object], requested: int, source: str) -> int:
    """How many rows to hold out: `requested`, or a tenth of the rows if that would be more than half of them.

    Raises InputError if there is only one row.
    """
    if 2 * requested <= len(rows):
        return requested
    if len(rows) < 2:
        raise InputError(f"{source} has {len(rows)} rows: expected 2 or more, one of them to be held out; add some")
    count = max(1, len(rows) // 10)
    console.print(
        f"held out {count:,} of {len(rows):,} rows, a tenth: --num-heldout {requested} would be more than half",
        markup=False,
    )
    return count


def train_heldout_split(rows: Sequence[T], heldout: int, seed: int) -> tuple[list[T], list[T]]:
    """All rows except `heldout` of them, and those: the last of a shuffle by the seed, each part in the rows' order.

    A conversation is not divided: its turns are all in the first part or all in the second. So the second part may be a
    few rows longer than `heldout`, or shorter if that would leave none in the first.

    Raises InputError if rows are to be held out of a single conversation.
    """
    numbers: dict[object, int] = {}
    groups = [
        numbers.setdefault(row.conversation if isinstance(row, Turn) else i, len(numbers)) for i, row in enumerate(rows)
    ]
    is_heldout = heldout_mask(np.array(groups, np.int64), heldout, seed)
    first = [row for row, is_second in zip(rows, is_heldout, strict=True) if not is_second]
    return first, [rows[i] for i in np.flatnonzero(is_heldout).tolist()]


def heldout_mask(groups: np.ndarray, heldout: int, seed: int) -> np.ndarray:
    """Which rows are held out; see `train_heldout_split`.

    Args:
        groups: The number of each row's group, which is not divided.
        heldout: How many rows to hold out.
        seed: That of the shuffle.

    Raises InputError if rows are to be held out of a single group.
    """
    _, first_rows, group_of_row, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    by_appearance = first_rows.argsort()
    if heldout and len(sizes) < 2:
        raise InputError(
            f"all {len(groups)} rows are of one conversation: expected 2 or more, one of them to be held out"
        )
    order = torch.randperm(len(sizes), generator=fold_in(key(seed), "heldout")).numpy()
    candidates = by_appearance[order[:0:-1]]
    count = int(np.searchsorted(sizes[candidates].cumsum(), heldout)) + 1 if heldout else 0
    is_chosen = np.zeros(len(sizes), bool)
    is_chosen[candidates[:count]] = True
    return is_chosen[group_of_row]
