"""A trained run merged into one plain model in Hugging Face's layout, and how far its outputs differ."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from fgpt.adapters import merge as merge_adapters
from fgpt.cli import run_dir
from fgpt.cli.console import console, result_console
from fgpt.cli.model_card.card import write_run_card
from fgpt.cli.tasks import task_type
from fgpt.cli.training.tokenizer import load_tokenizer
from fgpt.data import packing
from fgpt.errors import InputError
from fgpt.evaluation.output_difference import compare_outputs
from fgpt.io import models
from fgpt.io.files import atomic_dir, write_json
from fgpt.model import GPT
from fgpt.recipes import FineTuningRecipe
from fgpt.tokenizers.tokenizer_files import Tokenizer
from fgpt.tree import device, tree_map

NUM_EXAMPLES = 32
"""Held-out examples on which the merged model is compared with the trained one."""

MergeBase = Literal["dequantized", "original"]


def merge(name: str, merge_base: MergeBase | None) -> Path:
    """Write the merged model of run `name` into its folder, and print how far its outputs differ. A classifier becomes
    one that transformers' `AutoModelForSequenceClassification` reads.

    Raises InputError for a run without an adapter, or over a quantized base if `merge_base` is None.
    """
    out = run_dir.find_finished(name)
    recipe = run_dir.read_run_as(out, FineTuningRecipe, "a fine-tuned run, which has an adapter to merge")
    check_merge_base(name, recipe, merge_base)
    task = task_type(recipe)
    base = task.load_base(recipe)
    trained = run_dir.load_tuned(out, base)
    merged_params = merge_onto(recipe, trained, merge_base)
    target = device(base)
    examples = task.load_heldout_examples(recipe, NUM_EXAMPLES)
    batch = tree_map(lambda x: x.to(target), packing.collate([[example] for example in examples]))
    folder_name = run_dir.MERGED if recipe.quantize is None else f"{run_dir.MERGED}-{merge_base}"
    summary: dict[str, Any] = {"onto": merge_base, "rows": len(examples)}
    table = Table("merged against trained", "largest change of a logit", "change of the loss (nats per token)")
    with atomic_dir(out / folder_name) as partial:
        models.save(merged_params, partial, like=tokenizer_source(recipe), labels=task.class_names(recipe))
        stored = models.load(str(partial), None, device=target)
        for source, params in (("in memory", merged_params), ("read back", stored)):
            difference = compare_outputs(trained, params, batch)
            logit, nll = float(difference.logit), float(difference.nll)
            summary[source] = {"logit": logit, "nll": nll}
            table.add_row(source, f"{logit:.3g}", f"{nll:+.3g}")
        write_json(partial / "merge.json", summary)
        write_run_card(out, recipe, partial, task.class_names(recipe))
    result_console.print(table)
    console.print(f"saved {out / folder_name}", markup=False, soft_wrap=True)
    return out / folder_name


def tokenizer_source(recipe: FineTuningRecipe) -> Tokenizer | str:
    """The base, whose tokenizer files a merged model has too; the tokenizer itself if the run has added tokens."""
    return load_tokenizer(recipe).tokenizer if recipe.new_tokens else recipe.base


def check_merge_base(name: str, recipe: FineTuningRecipe, merge_base: MergeBase | None) -> None:
    """Raises InputError for a run over a quantized base if it is not said which base its adapter is merged into."""
    if recipe.quantize is not None and merge_base is None:
        raise InputError(
            f"{name} was trained over {recipe.quantize}: give --merge-base dequantized, the base it was trained over, "
            "or --merge-base original"
        )


def merge_onto(recipe: FineTuningRecipe, trained: GPT, merge_base: MergeBase | None) -> GPT:
    """The tuned model of a run as a plain one: its adapter merged into the base it has, or the original one."""
    if merge_base == "original":
        return merge_adapters(trained, task_type(recipe).load_base(replace(recipe, quantize=None)))
    return merge_adapters(trained, merge_base)
