"""A trained run as one plain model in the hub's layout, and what the merging changed."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from fgpt.adapters import merge as merged
from fgpt.cli import run_dir
from fgpt.cli.console import console
from fgpt.cli.evaluation.compare.scores import fitting
from fgpt.cli.inference import classifiers
from fgpt.cli.training.classification import to_score
from fgpt.cli.training.instruction_tuning import load_base, split
from fgpt.data import packing
from fgpt.data.classification_prompts import apply_labels, encode, parse_labels
from fgpt.data.prompt_templates import Example
from fgpt.errors import InputError
from fgpt.evaluation.output_difference import compare_outputs
from fgpt.io import models
from fgpt.io.files import atomic_dir, write_json
from fgpt.model import GPT
from fgpt.recipes import ClassificationRecipe, InstructionRecipe, PretrainingRecipe
from fgpt.tree import device, tree_map

MERGED = "merged"
"""The folder's name; over a quantized base -dequantized or -original follows, by what the adapter is added to."""

PROBES = 32
"""Held-out rows on which the merged model is held against the one that was trained."""

Onto = Literal["dequantized", "original"]


def merge(name: str, onto: Onto | None) -> Path:
    """Write the merged model of run `name` into its folder, and print by how much it answers differently. A classifier
    becomes one that transformers' `AutoModelForSequenceClassification` reads.

    Raises InputError for a run that has no adapter, or is over a quantized base where `onto` is not given.
    """
    out = run_dir.find_finished(name)
    run = run_dir.read_run(out)
    if isinstance(run, PretrainingRecipe):
        raise InputError(f"{out} is of no adapter: {run_dir.suggest_use(out, run)}")
    if run.quantize is not None and onto is None:
        raise InputError(
            f"{name} was trained over {run.quantize}: say --merge-base dequantized, its own base, or --merge-base original"
        )
    base = _base(run)
    trained = run_dir.load_tuned(out, base)
    plain = merged(trained, _base(replace(run, quantize=None)) if onto == "original" else onto)
    examples, at = _probes(run, base), device(base)
    batch = tree_map(lambda x: x.to(at), packing.collate([[e] for e in examples]))
    folder_name = MERGED if run.quantize is None else f"{MERGED}-{onto}"
    found: dict[str, Any] = {"onto": onto, "held-out rows": len(examples)}
    table = Table("merged against trained", "largest change of a logit", "change of the loss (nats per token)")
    with atomic_dir(out / folder_name) as saved:
        models.save(plain, saved, like=run.base, labels=_labels(run))
        stored = tree_map(lambda x: x.to(at), models.load(str(saved), None))
        for what, model in (("in memory", plain), ("read back", stored)):
            moved = compare_outputs(trained, model, batch)
            found |= {what: {"logit": float(moved.logit), "nll": float(moved.nll)}}
            table.add_row(what, f"{float(moved.logit):.3g}", f"{float(moved.nll):+.3g}")
        write_json(saved / "merge.json", found)
    console.print(table)
    console.print(f"saved {out / folder_name}", markup=False, soft_wrap=True)
    return out / folder_name


def _base(run: InstructionRecipe | ClassificationRecipe) -> GPT:
    """What the run adapted."""
    return (
        classifiers.with_head(run, load_base(run), run.labels)
        if isinstance(run, ClassificationRecipe)
        else load_base(run)
    )


def _labels(run: InstructionRecipe | ClassificationRecipe) -> tuple[str, ...]:
    """The names of the classes of a head of classes."""
    if not isinstance(run, ClassificationRecipe) or run.head != "classifier":
        return ()
    return tuple(parse_labels(run.labels).values())


def _probes(run: InstructionRecipe | ClassificationRecipe, base: GPT) -> list[Example]:
    """Examples that the run was not trained on."""
    tokenizer = models.tokenizer(run.base)
    if not isinstance(run, ClassificationRecipe):
        return fitting(base.cfg, tokenizer, run, split(run)[1][:PROBES])
    names, rows = apply_labels(parse_labels(run.labels), to_score(run)[:PROBES])
    labels, around = classifiers.labels_of(run, names, tokenizer), classifiers.frame_of(run, names, tokenizer)
    return encode(rows, labels, around, tokenizer, min(run.max_seq_len, base.cfg.n_ctx)).examples
