"""`fgpt data preview`: the examples that a recipe makes of its data, before anything is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.table import Table

from fgpt.cli.console import answers, console
from fgpt.cli.options import parse
from fgpt.cli.train_command import HELP, recipe_with_options, wants_recipe
from fgpt.cli.training import preview
from fgpt.cli.training.build import row_length
from fgpt.cli.training.conversation_rows import encode_rows, loss_rows, report_templates, resolve_template
from fgpt.cli.training.examples import load_source_rows
from fgpt.cli.training.tokenizer import load_tokenizer
from fgpt.data import packing
from fgpt.data.examples import Example, truncate
from fgpt.data.prompt_templates import template
from fgpt.errors import InputError
from fgpt.ranges import PositiveInt
from fgpt.recipes import InstructionRecipe


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
    preview_options, recipe_options = _split(options)
    count = parse(PreviewOptions, preview_options, None, f"fgpt data preview {name}").examples
    recipe = recipe_with_options(name, recipe_options, f"fgpt data preview {name}")
    if not isinstance(recipe, InstructionRecipe):
        raise InputError(f"{name} is a recipe of {recipe.kind}: expected one of instruction tuning, such as lora-nano")
    show(recipe, count)


def _split(options: Sequence[str]) -> tuple[list[str], list[str]]:
    """The preview's own options, and those of the recipe."""
    preview_options: list[str] = []
    recipe_options: list[str] = []
    rest = iter(options)
    for option in rest:
        if option == "--examples":
            preview_options += [option, *[value for value in [next(rest, None)] if value is not None]]
        elif option.startswith("--examples="):
            preview_options.append(option)
        else:
            recipe_options.append(option)
    return preview_options, recipe_options


class Counts(NamedTuple):
    """What becomes of a source."""

    source: str
    rows: int
    examples: list[Example]
    """Those that are trained on."""
    truncated: int
    long: int
    empty: int


def show(recipe: InstructionRecipe, count: int) -> None:
    """Print the first `count` examples, and a table of what becomes of each source. Held-out rows are not set apart.

    Raises InputError for bad data.
    """
    recipe = resolve_template(recipe)
    cfg, tokenizer, _ = load_tokenizer(recipe)
    max_seq_len = row_length(recipe, cfg)
    counts: list[Counts] = []
    for source, rows in load_source_rows(recipe):
        rows = loss_rows(recipe, rows)
        report_templates(recipe, rows)
        encoded, num_divided = encode_rows(rows, template(recipe.template), tokenizer)
        if num_divided:
            console.print(f"{source}: {num_divided:,} conversations are an example for each answer")
        counts.append(_count(recipe, source, len(rows), encoded, max_seq_len))
    examples = [example for of_source in counts for example in of_source.examples]
    for number, example in enumerate(examples[:count], 1):
        preview.print_example(f"example {number}, template {recipe.template}", example, tokenizer)
        console.print()
    console.print(_table(counts, max_seq_len))
    if any(of_source.long for of_source in counts) and recipe.overlong == "error":
        console.print("training refuses to start with rows that are too long: --overlong drop, --overlong cut, or more")


def _count(
    recipe: InstructionRecipe, source: str, num_rows: int, encoded: Sequence[Example], max_seq_len: int
) -> Counts:
    examples = [truncate(x, max_seq_len) for x in encoded] if recipe.overlong == "cut" else list(encoded)
    truncated = sum(len(a.tokens) != len(b.tokens) for a, b in zip(examples, encoded, strict=True))
    usable, dropped = packing.filter_by_length(examples, max_seq_len, drop=True)
    return Counts(source, num_rows, usable, truncated, dropped.long, dropped.empty)


def _table(counts: Sequence[Counts], max_seq_len: int) -> Table:
    table = Table("source", "rows", "examples", "tokens", "loss tokens", "truncated", "too long", "no answer")
    table.title, table.title_justify = f"at most {max_seq_len:,} tokens", "left"
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    for of_source in counts:
        source, num_rows, examples, truncated, long, empty = of_source
        tokens = sum(len(example.tokens) for example in examples)
        loss_tokens = sum(example.num_loss_tokens for example in examples)
        numbers = (num_rows, len(examples), tokens, loss_tokens, truncated, long, empty)
        table.add_row(source, *(f"{number:,}" for number in numbers))
    return table
