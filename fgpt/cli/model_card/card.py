"""The model card of a run: what was trained, by which command, with which results, and how it is loaded.

It is written from the run directory, and names no path of this machine. Of a private run it says the budget and no
figure: what is measured on the rows of a training would tell of them.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fgpt.cli import run_dir
from fgpt.cli.config_diff import as_text, command
from fgpt.cli.model_card.metadata import Form, hub_model, metadata, quantized_metadata
from fgpt.cli.model_card.results import number, result_tables, sides_table, table, training_figures
from fgpt.cli.model_card.usage import usage
from fgpt.cli.paths import shareable, shareable_fields
from fgpt.cli.training.build import adapts_fused_qkv
from fgpt.data.prompt_templates import TEMPLATES
from fgpt.io.files import read_json, write
from fgpt.io.models import CARD, TREE
from fgpt.io.peft.adapter_files import CONFIG as PEFT_CONFIG
from fgpt.recipes import FineTuningRecipe, TrainingRecipe

Sections = Mapping[str, str]
"""The text under each heading."""

OPTIONS = {
    "adapter.kind": "adapter",
    "adapter.rank": "rank",
    "adapter.alpha": "alpha",
    "adapter.target": "target",
    "quantize": "base in",
    "data": "data",
    "train": "data",
    "source": "data",
    "objective": "objective",
    "reward": "reward",
    "template": "prompt template",
    "lr": "learning rate",
    "optimizer": "optimizer",
    "epochs": "epochs",
    "micro_batch_size": "sequences in a micro-batch",
    "grad_accumulation_steps": "micro-batches in a step",
    "max_seq_len": "tokens in a sequence",
    "seed": "seed",
}
"""The options of a recipe that a card has in its table, and what it calls them; the command has all that differ."""


def saved_form(folder: Path) -> Form:
    """What a training has saved in a folder."""
    if (folder / PEFT_CONFIG).is_file():
        return "peft"
    if (folder / run_dir.ADAPTERS).is_file():
        return "adapters"
    return "fgpt" if (folder / TREE).is_file() else "transformers"


def write_run_card(
    run: Path, recipe: TrainingRecipe, folder: Path, classes: Sequence[str] = (), form: Form | None = None
) -> None:
    """Write the card of a run into a folder of what it has trained.

    Args:
        run: The run directory.
        recipe: Its recipe.
        folder: The folder of the files.
        classes: The classes of its classification head.
        form: Of the files; None tells it by their names.
    """
    write(folder / CARD, run_card(run, recipe, form or saved_form(folder), classes))


def write_trained_card(run: Path, recipe: TrainingRecipe, classes: Sequence[str]) -> None:
    """Write the card of what a training has saved in its run directory."""
    for folder in (run / run_dir.ADAPTER, run / run_dir.MODEL):
        if folder.is_dir():
            write_run_card(run, recipe, folder, classes)


def run_card(run: Path, recipe: TrainingRecipe, form: Form, classes: Sequence[str] = ()) -> str:
    """The card of a run, for files of a form."""
    fields = shareable_fields(recipe.to_json())
    fused = isinstance(recipe, FineTuningRecipe) and adapts_fused_qkv(recipe)
    sections = {
        "Training": _training(run, fields),
        "Results": _results(run, fields),
        "Prompt": _prompt(fields),
        "Use": usage(fields, form, classes, fused=fused),
    }
    return render(metadata(fields, recipe.kind, form), recipe.name, _summary(fields, form, classes), sections)


def write_quantized_card(folder: Path, base: str, name: str, layout: str, figures: Mapping[str, float]) -> None:
    """Write the card of a base in another format.

    Args:
        folder: The folder of the files.
        base: As its user named it.
        name: Of the format.
        layout: Of the folder.
        figures: What the format costs on the user's text; empty if that was not measured.
    """
    form: Form = "transformers" if layout == "bitsandbytes" else "fgpt"
    title = f"{shareable(base).rsplit('/', 1)[-1]} in {name}"
    words = ["fgpt", "quantize", shareable(base), "--to", name] + (["--layout", layout] if layout != "fgpt" else [])
    sections = {"Made by": f"```\n{shlex.join(words)}\n```"}
    if figures:
        sections["Cost"] = sides_table({name: figures})
    sections["Use"] = usage({"base": base}, form, (), fused=False)
    summary = f"{_link(base)} with its matrices quantized to {name}, by fgpt."
    tags = [name] + ["bitsandbytes"] * (layout == "bitsandbytes")
    write(folder / CARD, render(quantized_metadata(base, form, tags), title, summary, sections))


def render(data: Mapping[str, Any], title: str, summary: str, sections: Sections) -> str:
    """A card: the metadata as YAML, a heading, a sentence, and sections."""
    from huggingface_hub import ModelCardData  # here, because importing it takes longer than importing fgpt

    parts = [f"---\n{ModelCardData(**data).to_yaml()}\n---", f"# {title}", summary]
    parts += [f"## {heading}\n\n{text}" for heading, text in sections.items() if text]
    return "\n\n".join(parts) + "\n"


def _link(base: str) -> str:
    """A base as a link to the Hub if it is there."""
    hub = hub_model(base)
    return f"[{hub}](https://huggingface.co/{hub})" if hub else f"`{shareable(base)}`"


def _summary(fields: Mapping[str, Any], form: Form, classes: Sequence[str]) -> str:
    what = {"peft": "An adapter", "adapters": "Adapters", "gguf-lora": "A LoRA"}.get(form)
    what = what or ("A classifier" if classes else "A language model")
    if not fields.get("base"):
        return f"{what}, trained by fgpt from random parameters."
    how = " of" if form in ("peft", "adapters", "gguf-lora") else ", tuned from"
    return f"{what}{how} {_link(fields['base'])}, trained by fgpt."


def _training(run: Path, fields: Mapping[str, Any]) -> str:
    """The command, and the most important options."""
    rows: dict[str, str] = {}
    for path, name in OPTIONS.items():
        value: Any = fields
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        is_unused = path == "epochs" and fields.get("steps")
        if value not in (None, "", []) and name not in rows and not is_unused:
            rows[name] = f"`{value:g}`" if isinstance(value, float) else f"`{as_text(value)}`"
    rows |= _versions(run)
    return f"```\n{_command(run, fields)}\n```\n\n" + table(["", ""], [[name, x] for name, x in rows.items()])


def _command(run: Path, fields: Mapping[str, Any]) -> str:
    """The command that makes the run again."""
    if not (run / run_dir.COMBINED).is_file():
        return command(fields)
    combined = read_json(run / run_dir.COMBINED)
    words = ["fgpt", "combine", *combined["runs"], "--method", combined["method"]]
    words += ["--weights", *map(repr, combined["weights"])]
    for name in ("density", "rank", "seed"):
        words += [f"--{name}", str(combined[name])] if combined[name] is not None else []
    return shlex.join([*words, "--name", fields["name"]])


def _versions(run: Path) -> dict[str, str]:
    environment = read_json(run / run_dir.ENVIRONMENT) if (run / run_dir.ENVIRONMENT).is_file() else {}
    packages = environment.get("packages") or {}
    return {f"{name} version": str(packages[name]) for name in ("fgpt", "torch") if name in packages}


def _results(run: Path, fields: Mapping[str, Any]) -> str:
    privacy = fields.get("privacy") or {}
    if privacy.get("epsilon") is not None:
        budget = f"ε = {number(privacy['epsilon'])}, δ = {number(privacy['delta'])}"
        return (
            f"Each example of the training is differentially private: {budget}. No figures are given, as these are not."
        )
    figures = training_figures(run)
    tables = [table(["", ""], [[name, x] for name, x in figures.items()])] if figures else []
    return "\n\n".join([*tables, *result_tables(run)])


def _prompt(fields: Mapping[str, Any]) -> str:
    """The form of a prompt, if the run has a template of text."""
    template = TEMPLATES.get(str(fields.get("template")))
    if template is None:
        return ""
    if template.chat:
        return "The chat template of the base's tokenizer."
    return f"```\n{template.without_input}```"
