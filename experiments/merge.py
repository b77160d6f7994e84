"""A trained run as one plain model in the hub's layout, and what the merging changed."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from experiments import folder, predict
from experiments.compare.scores import fitting
from experiments.console import console
from experiments.eval_run import unseen
from experiments.runs import Classify, Pretrain, Run
from experiments.train import base_of, split
from fgpt.adapters import merge as merged
from fgpt.data import packing
from fgpt.data.labels import words_of
from fgpt.data.templates import Example
from fgpt.errors import InputError
from fgpt.io import hub
from fgpt.io.files import whole_folder, write_json
from fgpt.model import GPT
from fgpt.shift import shift
from fgpt.tree import device, tree_map

MERGED = "merged"
"""The folder's name; over a quantised base -dequantised or -original follows, by what the adapter is added to."""

PROBES = 32
"""Held-out rows on which the merged model is held against the one that was trained."""

Onto = Literal["dequantised", "original"]


def merge(name: str, onto: Onto | None) -> Path:
    """Write the merged model of run `name` into its folder, and print by how much it answers differently. A classifier
    becomes one that transformers' `AutoModelForSequenceClassification` reads.

    Raises InputError for a run that has no adapter, or is over a quantised base where `onto` is not given.
    """
    out = folder.find(name)
    run = folder.read_run(out)
    if isinstance(run, Pretrain):
        raise InputError(f"{out} is of no adapter: {folder.use_of(out, run)}")
    if run.quantize is not None and onto is None:
        raise InputError(
            f"{name} was trained over {run.quantize}: say --onto dequantised, its own base, or --onto original"
        )
    base = _base(run)
    trained = folder.load_tuned(out, base)
    plain = merged(trained, _base(replace(run, quantize=None)) if onto == "original" else onto)
    examples, at = _probes(run, base), device(base)
    batch = tree_map(lambda x: x.to(at), packing.collate([[e] for e in examples]))
    folder_name = MERGED if run.quantize is None else f"{MERGED}-{onto}"
    found: dict[str, Any] = {"onto": onto, "held-out rows": len(examples)}
    table = Table("merged against trained", "largest change of a logit", "change of the loss (nats per token)")
    with whole_folder(out / folder_name) as saved:
        hub.save(plain, saved, like=run.base, labels=_labels(run))
        stored = tree_map(lambda x: x.to(at), hub.load(str(saved), None))
        for what, model in (("in memory", plain), ("read back", stored)):
            moved = shift(trained, model, batch)
            found |= {what: {"logit": float(moved.logit), "nll": float(moved.nll)}}
            table.add_row(what, f"{float(moved.logit):.3g}", f"{float(moved.nll):+.3g}")
        write_json(saved / "merge.json", found)
    console.print(table)
    console.print(f"saved {out / folder_name}", markup=False, soft_wrap=True)
    return out / folder_name


def _base(run: Run | Classify) -> GPT:
    """What the run adapted."""
    return predict.with_head(run, base_of(run), run.labels) if isinstance(run, Classify) else base_of(run)


def _labels(run: Run | Classify) -> tuple[str, ...]:
    """The names of the classes of a head of classes."""
    if not isinstance(run, Classify) or run.form != "classes":
        return ()
    return tuple(words_of(run.labels).values())


def _probes(run: Run | Classify, base: GPT) -> list[Example]:
    """Examples that the run was not trained on."""
    if isinstance(run, Classify):
        return unseen(run, PROBES).examples
    return fitting(base.cfg, hub.tokenizer(run.base), run, split(run)[1][:PROBES])
