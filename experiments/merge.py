"""A trained run as one plain model in the hub's layout, and what the merging changed."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from experiments import folder
from experiments.compare.scores import fitting
from experiments.console import console
from experiments.train import base_of, split
from fgpt.adapters import merge as merged
from fgpt.data import packing
from fgpt.errors import InputError
from fgpt.io import hub
from fgpt.io.files import whole_folder, write_json
from fgpt.shift import shift
from fgpt.tree import device, tree_map

MERGED = "merged"
"""The folder's name; over a quantised base -dequantised or -original follows, by what the adapter is added to."""

PROBES = 32
"""Held-out rows on which the merged model is held against the one that was trained."""

Onto = Literal["dequantised", "original"]


def merge(name: str, onto: Onto | None) -> Path:
    """Write the merged model of run `name` into its folder, and print by how much it answers differently.

    Raises InputError for a run over a quantised base where `onto` is not given.
    """
    out = folder.find(name)
    run = folder.instruction_run(out)
    if run.quantize is not None and onto is None:
        raise InputError(
            f"{name} was trained over {run.quantize}: say --onto dequantised, its own base, or --onto original"
        )
    base = base_of(run)
    trained = folder.load_tuned(out, base)
    plain = merged(trained, base_of(replace(run, quantize=None)) if onto == "original" else onto)
    rows = split(run)[1][:PROBES]
    examples, at = fitting(base.cfg, hub.tokenizer(run.base), run, rows), device(base)
    batch = tree_map(lambda x: x.to(at), packing.collate([[e] for e in examples]))
    folder_name = MERGED if run.quantize is None else f"{MERGED}-{onto}"
    found: dict[str, Any] = {"onto": onto, "held-out rows": len(examples)}
    table = Table("merged against trained", "largest change of a logit", "change of the loss (nats per token)")
    with whole_folder(out / folder_name) as saved:
        hub.save(plain, saved, like=run.base)
        stored = tree_map(lambda x: x.to(at), hub.load(str(saved), None))
        for what, model in (("in memory", plain), ("read back", stored)):
            moved = shift(trained, model, batch)
            found |= {what: {"logit": float(moved.logit), "nll": float(moved.nll)}}
            table.add_row(what, f"{float(moved.logit):.3g}", f"{float(moved.nll):+.3g}")
        write_json(saved / "merge.json", found)
    console.print(table)
    console.print(f"saved {out / folder_name}", markup=False, soft_wrap=True)
    return out / folder_name
