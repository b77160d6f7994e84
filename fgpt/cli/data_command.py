"""`fgpt data preview`: the examples that a recipe makes of its data, before anything is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.table import Table

from fgpt.cli.console import answers, console, result_console
from fgpt.cli.options import option_names, parse
from fgpt.cli.train_command import HELP, recipe_with_options, split_options, wants_recipe
from fgpt.cli.training import preview
from fgpt.cli.training.examples import encoding_of, load_sources
from fgpt.cli.training.row_reports import report_parts, resolve_template
from fgpt.cli.training.token_cache import TokenizedSource
from fgpt.cli.training.tokenizer import load_tokenizer
from fgpt.data import packing
from fgpt.data.example_store import StoredExamples
from fgpt.errors import InputError
from fgpt.ranges import PositiveInt
from fgpt.recipes import InstructionRecipe, PreferenceRecipe


@dataclass(frozen=True)
class PreviewOptions:
    """What a preview has in addition to the options of a recipe."""

    examples: PositiveInt = 3
    """Examples to show in full, the first ones."""


def run(args: Sequence[str]) -> None:
    """Show what the arguments name: preview RECIPE [options]. Raises InputError for bad ones."""
    kind, *options = args or [""]
    if kind in HELP:
        answers.print("usage: fgpt data preview RECIPE [--examples N] [options]\n")
        answers.print("  fgpt data preview RECIPE\n      The first examples in full, what is trained on, and counts.")
        answers.print("\nfgpt data preview RECIPE --help lists the options of a recipe.")
    elif kind == "preview":
        _preview(options)
    else:
        raise InputError("expected preview after fgpt data; type: fgpt data preview RECIPE")


def _preview(args: Sequence[str]) -> None:
    name, *options = args or [""]
    if wants_recipe("data preview", name):
        return
    preview_options, recipe_options = split_options(options, option_names(PreviewOptions))
    count = parse(PreviewOptions, preview_options, None, f"fgpt data preview {name}").examples
    recipe = recipe_with_options(name, recipe_options, f"fgpt data preview {name}")
    if not isinstance(recipe, InstructionRecipe):
        raise InputError(f"{name} is a recipe of {recipe.kind}: expected one of instruction tuning, such as lora-nano")
    show(recipe, count)


class Counts(NamedTuple):
    """What becomes of a source."""

    source: str
    rows: int
    examples: StoredExamples
    """Those that are trained on."""
    truncated: int
    long: int
    empty: int


def show(recipe: InstructionRecipe, count: int) -> None:
    """Print the first `count` examples, and a table of what becomes of each source. Held-out rows are not set apart.

    Raises InputError for bad data.
    """
    if isinstance(recipe, PreferenceRecipe):
        raise InputError(f"{recipe.name} is of preferences, which have no preview yet: fgpt train prints their format")
    loaded = load_tokenizer(recipe)
    recipe = resolve_template(recipe, loaded.tokenizer)
    encoding = encoding_of(recipe, loaded)
    counts = [_count(recipe, name, source, encoding.max_seq_len) for name, source in load_sources(recipe, encoding)]
    examples = [example for of_source in counts for example in of_source.examples[:count]]
    for number, example in enumerate(examples[:count], 1):
        preview.print_example(f"example {number}, template {recipe.template}", example, encoding.tokenizer)
        console.print()
    result_console.print(_table(counts, encoding.max_seq_len))
    if any(of_source.long for of_source in counts) and recipe.overlong == "error":
        console.print("training refuses to start with rows that are too long: --overlong drop, --overlong cut, or more")


def _count(recipe: InstructionRecipe, name: str, source: TokenizedSource, max_seq_len: int) -> Counts:
    whole = StoredExamples.from_batches(source.examples)
    examples, truncated = whole.split_texts(max_seq_len)[0], 0
    report_parts(len(examples) - len(whole), max_seq_len)
    if recipe.overlong == "cut":
        examples, truncated = examples.truncate(max_seq_len)
    usable, dropped = packing.usable_indices(examples, max_seq_len, drop=True)
    num_rows = sum(batch.num_rows for batch in source.rows)
    return Counts(name, num_rows, examples.take(usable), truncated, dropped.long, dropped.empty)


def _table(counts: Sequence[Counts], max_seq_len: int) -> Table:
    table = Table("source", "rows", "examples", "tokens", "loss tokens", "truncated", "too long", "no answer")
    table.title, table.title_justify = f"at most {max_seq_len:,} tokens", "left"
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    for of_source in counts:
        source, num_rows, examples, truncated, long, empty = of_source
        tokens = int(examples.lengths.sum())
        numbers = (num_rows, len(examples), tokens, examples.num_loss_tokens, truncated, long, empty)
        table.add_row(source, *(f"{number:,}" for number in numbers))
    return table
