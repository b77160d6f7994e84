"""The examples that a fine-tuning recipe trains on, and the rows held out of them."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from fgpt.cli.console import console
from fgpt.cli.training.eval_sets import parse_eval_data
from fgpt.cli.training.forgotten_rows import forget_rows
from fgpt.cli.training.job import Origin, tokenizer_contents
from fgpt.cli.training.nano_rows import read_tasks
from fgpt.cli.training.row_passages import RowPassages, row_passages
from fgpt.cli.training.row_reports import report_counts, report_left_out, report_parts
from fgpt.cli.training.streaming import StreamOrder
from fgpt.cli.training.token_cache import TokenizedSource
from fgpt.cli.training.tokenized_sources import stored_rows, tokenized_source
from fgpt.cli.training.tokenizer import RecipeTokenizer, load_tokenizer
from fgpt.data import classification_datasets, instruction_datasets, packing
from fgpt.data.classification_prompts import LabeledText
from fgpt.data.example_store import StoredExamples, StoredRows, bounds
from fgpt.data.examples import Example
from fgpt.data.mixtures import check_weights
from fgpt.data.prompt_templates import template
from fgpt.data.rows import ConversationRow, InstructionRow, Turn, last_turns, turns_of
from fgpt.data.source_syntax import parse_source
from fgpt.data.tokenization import Encoding, RowChunk, shorten_pages, tokenize
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
    """They have answers and fit a row. Those to forget have weight 0."""
    heldout: list[InstructionRow]
    """A row for each answer of a conversation."""
    sources: tuple[SourceRange, ...]
    """In the order of the recipe's `data`."""
    stream: StreamOrder | None = None
    """If data is streamed, all of it; `examples` are then its first block."""
    origin: Callable[[int], Origin] | None = None
    """Of each of the `examples`, by its index; None if data is streamed."""

    @property
    def by_source(self) -> list[Sequence[Example]]:
        """The examples of each source."""
        return [self.examples[start:stop] for _, start, stop in self.sources]


def load_instruction_data(recipe: InstructionRecipe, encoding: Encoding | None = None) -> InstructionData:
    """Examples to train on and rows held out: the embedded data's own split, or the last of a shuffle by the recipe's
    seed. The format of each source is printed, and what was left out, shortened, truncated or split.

    Args:
        recipe: The recipe.
        encoding: Its `encoding_of`, if it is made already.

    Raises InputError if a source cannot be read, if holding out would leave nothing to train on, and for a longer row
    if the recipe's `overlong` is "error".
    """
    encoding = encoding or encoding_of(recipe)
    if recipe.streaming:
        stream = open_stream(recipe, encoding)
        whole = SourceRange(stream.source, 0, len(stream.first_block))
        return InstructionData(stream.first_block, turns_of(stream.heldout), (whole,), stream)
    sources = load_sources(recipe, encoding)
    whole = StoredExamples.from_batches([batch for _, source in sources for batch in source.examples])
    stored, owners = whole.split_texts(encoding.max_seq_len)
    report_parts(len(stored) - len(whole), encoding.max_seq_len)
    whole_starts = bounds([sum(batch.num_rows for batch in source.examples) for _, source in sources])[:-1]
    starts = np.searchsorted(owners, whole_starts)
    if recipe.data == NANO:
        heldout: list[InstructionRow] = [*read_tasks(NANO_HELDOUT)]
    else:
        rows = [StoredRows(source.rows) for _, source in sources]
        first_rows = bounds([len(source) for source in rows])
        numbers = stored.rows + np.repeat(first_rows[:-1], np.diff([*starts, len(stored)]))
        is_heldout = _heldout_rows(recipe, int(first_rows[-1]))
        heldout = turns_of(_rows_at(rows, first_rows, np.flatnonzero(is_heldout)))
        training = np.flatnonzero(~is_heldout[numbers])
        stored, starts = stored.take(training), np.searchsorted(training, starts)

    def origin(index: int) -> Origin:
        """Of an example of `stored`."""
        source = int(np.searchsorted(starts, index, "right")) - 1
        name, number = sources[source][0], int(stored.rows[index])
        row = StoredRows(sources[source][1].rows)[number]
        where = row.conversation if isinstance(row, ConversationRow | Turn) else ""
        which = " of those that are trained on" if sources[source][1].left_out else ""
        return Origin(name, number + 1, where.removeprefix(f"{name}, ") or f"row {number + 1}{which}")

    def place(index: int) -> str:
        source, _, where, _ = origin(index)
        return f"{source}, {where}"

    examples, usable = _fit(recipe, stored, encoding.max_seq_len, place)
    if recipe.forget is not None:
        examples = forget_rows(examples, recipe.forget, _forgotten_examples(recipe, encoding))
    edges = [*np.searchsorted(usable, starts).tolist(), len(examples)]
    ranges = zip([name for name, _ in sources], edges[:-1], edges[1:], strict=True)
    source_ranges = tuple(SourceRange(*each) for each in ranges)
    return InstructionData(examples, heldout, source_ranges, origin=lambda index: origin(int(usable[index])))


def _forgotten_examples(recipe: InstructionRecipe, encoding: Encoding) -> StoredExamples:
    """The examples of the rows to forget, made as those of the data are."""
    assert recipe.forget is not None
    passages = row_passages(recipe, encoding)
    contents = _contents(recipe, passages)
    source = tokenized_source(recipe.forget, _columns(recipe, recipe.forget), encoding, contents, passages)
    examples, _ = StoredExamples.from_batches(source.examples).split_texts(encoding.max_seq_len)
    return examples.truncate(encoding.max_seq_len)[0] if recipe.overlong == "cut" else examples


def check_data_options(recipe: InstructionRecipe) -> None:
    """Raises InputError for options of data that have no effect, and for evaluations without rows."""
    if recipe.data == NANO and recipe.columns != instruction_datasets.Columns():
        raise InputError("--columns name the columns of a file, and --data nano is embedded: leave them out")
    if recipe.data == NANO and recipe.num_heldout != InstructionRecipe.num_heldout:
        raise InputError("--num-heldout is of data of your own, and --data nano has held-out rows: leave it out")
    if recipe.documents is None and recipe.num_passages != InstructionRecipe.num_passages:
        raise InputError("--num-passages is of --documents: give both, or leave it out")
    if recipe.documents is not None and recipe.data == NANO:
        raise InputError("--documents adds passages to questions, and --data nano asks none: give data of your own")
    if recipe.documents is not None and recipe.streaming:
        raise InputError("--documents searches for every row before training: leave --streaming out")
    if recipe.shuffle_buffer_size != InstructionRecipe.shuffle_buffer_size and not recipe.streaming:
        raise InputError("--shuffle-buffer-size is of --streaming: give both, or leave it out")
    if recipe.mixture != InstructionRecipe.mixture and source_weights(recipe.data)[0][1] is None:
        raise InputError(f"--mixture {recipe.mixture} needs weights: --data a.jsonl:0.7 b.jsonl:0.3")
    if isinstance(recipe.eval_every, int) and not recipe.num_heldout and recipe.data != NANO and not recipe.eval_data:
        raise InputError(
            f"--eval-every {recipe.eval_every} needs held-out examples, and --num-heldout is 0: give --eval-data, or "
            "leave it out"
        )


def load_heldout_rows(recipe: InstructionRecipe, encoding: Encoding | None = None) -> list[InstructionRow]:
    """The rows of `load_instruction_data` that are held out. Others are neither tokenized nor kept: tokens that are not
    cached are not made.
    """
    if recipe.data == NANO:
        return [*read_tasks(NANO_HELDOUT)]
    encoding = encoding or encoding_of(recipe)
    if recipe.streaming:
        return _rows_to_answer(open_stream(recipe, encoding).heldout, encoding)
    rows = _read_rows(recipe, [name for name, _ in source_weights(recipe.data)], encoding)
    first_rows = bounds([len(source) for source in rows])
    is_heldout = _heldout_rows(recipe, int(first_rows[-1]))
    return _rows_to_answer(_rows_at(rows, first_rows, np.flatnonzero(is_heldout)), encoding)


def load_eval_sets(recipe: InstructionRecipe, encoding: Encoding | None = None) -> dict[str, list[InstructionRow]]:
    """The rows of each evaluation set, by its name, a row for each answer of a conversation. Raises InputError as
    `parse_eval_data` does, and for a source that cannot be read.
    """
    if not recipe.eval_data:
        return {}
    encoding = encoding or encoding_of(recipe)
    sources = parse_eval_data(recipe.eval_data)
    return {
        name: _rows_to_answer(_read_rows(recipe, [source], encoding)[0], encoding) for name, source in sources.items()
    }


def load_rows_to_answer(
    recipe: InstructionRecipe, encoding: Encoding
) -> tuple[list[InstructionRow], list[InstructionRow]]:
    """Rows whose prompts are trained on, without their answers, and rows held out. A conversation is a row for each of
    its answers.

    Raises InputError as `load_instruction_data` does, and for sources with weights.
    """
    if recipe.data == NANO:
        return [*read_tasks(NANO_TASKS)], [*read_tasks(NANO_HELDOUT)]
    if any(weight is not None for _, weight in source_weights(recipe.data)):
        raise InputError("--data has weights, and prompts are not mixed by weights: leave them out")
    rows = [row for source in _read_rows(recipe, recipe.data, encoding) for row in source]
    first, second = train_heldout_split(
        rows, num_heldout(rows, recipe.num_heldout, ", ".join(recipe.data)), recipe.seed
    )
    return _rows_to_answer(first, encoding), _rows_to_answer(second, encoding)


def open_stream(recipe: InstructionRecipe, encoding: Encoding) -> StreamOrder:
    """The data of a recipe that streams it. Raises InputError as `StreamOrder` does, and for weights."""
    ((name, weight),) = source_weights(recipe.data[:1])
    if weight is not None:
        raise InputError(f"--data {recipe.data[0]}: --streaming reads one source, which has no weight: leave it out")
    return StreamOrder(recipe, encoding, _columns(recipe, name))


def encoding_of(recipe: InstructionRecipe, loaded: RecipeTokenizer | None = None) -> Encoding:
    """How the recipe's rows become tokens, by its tokenizer, which is loaded if it is not yet. Raises InputError for an
    unknown template.
    """
    cfg, tokenizer, _ = loaded or load_tokenizer(recipe)
    max_seq_len = min(recipe.max_seq_len, cfg.n_ctx)
    return Encoding(template(recipe.template), tokenizer, max_seq_len, recipe.assistant_turns == "last")


def load_sources(recipe: InstructionRecipe, encoding: Encoding) -> list[tuple[str, TokenizedSource]]:
    """The name and the tokens of each source of the recipe, in order; one that is named twice is read once. What is to
    be said of them is printed.
    """
    if recipe.data == NANO:
        rows = [InstructionRow(task.instruction, task.input, task.output) for task in read_tasks(NANO_TASKS)]
        tokens = tokenize(RowChunk(0, rows), encoding)
        return [("nano", TokenizedSource([tokens.examples], [tokens.rows]))]
    names = [name for name, _ in source_weights(recipe.data)]
    by_name = dict[str, TokenizedSource]()
    passages = row_passages(recipe, encoding)
    contents = _contents(recipe, passages)
    for name in names:
        if name not in by_name:
            by_name[name] = tokenized_source(name, _columns(recipe, name), encoding, contents, passages)
            console.print(by_name[name].format, markup=False, soft_wrap=True)
    if passages is not None:
        passages.report()
    warn_of_repeats(names, recipe.num_heldout)
    report_left_out(sum((source.left_out for source in by_name.values()), Counter[str]()))
    counts = sum((source.counts for source in by_name.values()), Counter[str]())
    num_rows = sum(batch.num_rows for source in by_name.values() for batch in source.rows)
    report_counts(recipe, counts, num_rows, encoding.max_seq_len)
    return [(name, by_name[name]) for name in names]


def warn_of_repeats(names: Sequence[str], num_heldout: float) -> None:
    """Print a warning if a source is given several times, and rows are held out."""
    for name, count in Counter(names).items():
        if count > 1 and num_heldout:
            console.print(
                f"warning: {name} is given {count} times: rows that are held out once are trained on otherwise, and "
                "the held-out loss is too low; repeat a source by a weight",
                markup=False,
                soft_wrap=True,
            )


def source_weights(sources: Sequence[str]) -> list[tuple[str, float | None]]:
    """Each source of `--data` and its weight in the mixture, None if it has none.

    Raises InputError as `check_weights` does.

    >>> source_weights(["alpaca:0.7", "mine.jsonl:0.3"])
    [('alpaca', 0.7), ('mine.jsonl', 0.3)]
    """
    if not sources:
        raise InputError("--data names no source: give one or several")
    parsed = [parse_source(text) for text in sources]
    weights = [(str(replace(source, weight=None)), source.weight) for source in parsed]
    check_weights(weights)
    return weights


def _read_rows(recipe: InstructionRecipe, sources: Sequence[str], encoding: Encoding) -> list[Sequence[InstructionRow]]:
    """The rows of each source. What is left out is printed."""
    rows: list[Sequence[InstructionRow]] = []
    left_out = Counter[str]()
    passages = row_passages(recipe, encoding)
    contents = _contents(recipe, passages)
    for name in sources:
        source = stored_rows(name, _columns(recipe, name), encoding, contents, passages)
        left_out += source.left_out
        rows.append(source.rows)
    report_left_out(left_out)
    return rows


def _rows_to_answer(rows: Sequence[InstructionRow], encoding: Encoding) -> list[InstructionRow]:
    """Rows to be answered, as `tokenize` prepares those to train on."""
    chosen = last_turns(rows)[0] if encoding.last_turns else rows
    return turns_of(shorten_pages(chosen, encoding)[0])


def _columns(recipe: InstructionRecipe, source: str) -> instruction_datasets.Columns | None:
    columns = None if recipe.columns == instruction_datasets.Columns() else recipe.columns
    return instruction_datasets.columns_of(source, len(recipe.data), columns)


def _contents(recipe: InstructionRecipe, passages: RowPassages | None) -> list[str | bytes]:
    """What the tokens of a row follow from, besides the row and its encoding."""
    identity = [] if passages is None else [passages.identity]
    return [*tokenizer_contents(recipe.base), *recipe.new_tokens, *identity]


def _fit(
    recipe: InstructionRecipe, examples: StoredExamples, max_seq_len: int, place: Callable[[int], str]
) -> tuple[StoredExamples, np.ndarray]:
    """Those that can be trained on, of at most `max_seq_len` tokens, and their indices. How many were truncated or left
    out is printed.

    Raises InputError for a longer row if the recipe's `overlong` is "error".
    """
    if recipe.overlong == "cut":
        examples, truncated = examples.truncate(max_seq_len)
        if truncated:
            console.print(f"truncated {truncated} responses of rows longer than {max_seq_len} tokens")
    try:
        usable, dropped = packing.usable_indices(examples, max_seq_len, recipe.overlong != "error", place)
    except InputError as err:
        raise InputError(f"{err} (--max-seq-len N; --overlong drop or cut)") from None
    if dropped.long or dropped.empty:
        console.print(
            f"left out {dropped.long} rows longer than {max_seq_len} tokens and {dropped.empty} without a response"
        )
    return examples.take(usable), usable


def _heldout_rows(recipe: InstructionRecipe, num_rows: int) -> np.ndarray:
    count = num_heldout(range(num_rows), recipe.num_heldout, ", ".join(recipe.data))
    is_heldout = np.zeros(num_rows, bool)
    is_heldout[sorted(heldout_indices(num_rows, count, recipe.seed))] = True
    return is_heldout


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


def warn_of_shared_texts(train: Sequence[LabeledText], test: Sequence[LabeledText]) -> list[str]:
    """A warning if texts that are scored are trained on.

    >>> warn_of_shared_texts([LabeledText("a"), LabeledText("b")], [LabeledText("a", label="x"), LabeledText("c")])
    ['warning: 1 of the test rows has a text that is trained on, too: the scores are too high']
    """
    texts = {(row.text, row.text2) for row in train}
    shared = sum((row.text, row.text2) in texts for row in test)
    have = "has a text that is" if shared == 1 else "have texts that are"
    return [f"warning: {shared:,} of the test rows {have} trained on, too: the scores are too high"] if shared else []


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
        raise InputError(
            f"{source} has {len(rows)} rows: expected 2 or more, one of them to be held out; add some, or "
            "hold out none with --num-heldout 0"
        )
    count = max(1, len(rows) // 10)
    console.print(
        f"held out {count:,} of {len(rows):,} rows, a tenth: --num-heldout {requested} would be more than half",
        markup=False,
    )
    return count


def train_heldout_split(rows: Sequence[T], heldout: int, seed: int) -> tuple[list[T], list[T]]:
    """All rows except `heldout` of them, and those: each part in the rows' order."""
    second = heldout_indices(len(rows), heldout, seed)
    return [row for i, row in enumerate(rows) if i not in second], [rows[i] for i in sorted(second)]


def heldout_indices(num_rows: int, heldout: int, seed: int) -> set[int]:
    """The indices of the rows to hold out: the last `heldout` of a shuffle by the seed. At least one row is left."""
    order = torch.randperm(num_rows, generator=fold_in(key(seed), "heldout")).tolist()
    return set(order[max(1, num_rows - heldout) :])
