"""What the Hugging Face Hub knows of a model by the metadata of its card: base, license, data sets, library, task.

Only names that the Hub has are written: a local base or file has none.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from fgpt.data import classification_datasets, instruction_datasets
from fgpt.data.records import EXTENSIONS
from fgpt.data.source_syntax import exists, parse_source
from fgpt.errors import InputError
from fgpt.io.gguf_header import read_header
from fgpt.io.models import CARD, EMBEDDED, PACKAGED, resolve

Form = Literal["peft", "adapters", "transformers", "fgpt", "gguf", "gguf-lora", "ollama"]
"""Of the files: PEFT's, adapters in one file of ours, a model as transformers has it, a tree of ours, a GGUF file of a
model or of an adapter, one of a model with a Modelfile."""

LIBRARIES: dict[Form, str] = {
    "peft": "peft",
    "adapters": "fgpt",
    "transformers": "transformers",
    "fgpt": "fgpt",
    "gguf": "gguf",
    "gguf-lora": "gguf",
    "ollama": "gguf",
}
LICENSE = ("license", "license_name", "license_link")
METHODS = {"instruction": "sft", "reward": "reward-model", "grpo": "grpo"}
"""What TRL calls a kind of training, in its tags."""
DATASETS = {
    **{name: dataset.repo for name, dataset in classification_datasets.HUB_DATASETS.items()},
    **{name: dataset.repo for name, dataset in instruction_datasets.HUB_DATASETS.items()},
    **{name: dataset.repo for name, dataset in instruction_datasets.HUB_TEXTS.items()},
}
"""The repositories of the data sets that recipes name shortly."""
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def metadata(run: Mapping[str, Any], kind: str, form: Form) -> dict[str, Any]:
    """The metadata of what a run has trained.

    Args:
        run: The fields of its recipe, shareable.
        kind: The kind of the recipe.
        form: Of the saved files.
    """
    base = run.get("base", "")
    hub_base = hub_model(base)
    adapter = run.get("adapter") or {}
    has_adapter = form in ("peft", "adapters", "gguf-lora")
    relation = "adapter" if has_adapter else "quantized" if form in ("gguf", "ollama") else "finetune"
    tags = ["fgpt", METHODS.get(kind, run.get("objective", kind)), adapter.get("kind", "")]
    if form == "peft" and hub_base:  # as PEFT writes it
        tags.append(f"base_model:adapter:{hub_base}")
    is_classifier = kind == "reward" or run.get("head") == "classifier"
    return _without_empty(
        {
            "base_model": hub_base,
            "base_model_relation": relation if hub_base else None,
            "library_name": LIBRARIES[form],
            "pipeline_tag": "text-classification" if is_classifier else "text-generation",
            "tags": list(dict.fromkeys(filter(None, tags))),
            "datasets": hub_datasets(run),
            **base_license(base),
        }
    )


def quantized_metadata(base: str, form: Form, tags: list[str]) -> dict[str, Any]:
    """The metadata of a base in another format."""
    hub_base = hub_model(base)
    return _without_empty(
        {
            "base_model": hub_base,
            "base_model_relation": "quantized" if hub_base else None,
            "library_name": LIBRARIES[form],
            "pipeline_tag": "text-generation",
            "tags": ["fgpt", *tags],
            **base_license(base),
        }
    )


def _without_empty(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value}


def hub_model(base: str) -> str | None:
    """The Hub's name of a base as recipes name it; None if it is embedded, a folder or a file.

    >>> hub_model("smollm2"), hub_model("gpt2@main"), hub_model("nano"), hub_model("runs/a/merged")
    ('HuggingFaceTB/SmolLM2-135M-Instruct', 'gpt2', None, None)
    """
    if base in PACKAGED:
        return PACKAGED[base][1]
    name = base.partition("@")[0]
    is_name = REPOSITORY.fullmatch(name if "/" in name else f"owner/{name}") and not name.endswith(".gguf")
    return name if is_name and name not in EMBEDDED and not exists(base) else None


def base_license(base: str) -> dict[str, str]:
    """What the card of a base says of its license, or its GGUF file; nothing if neither says it."""
    try:
        path = resolve(base)
        if path.is_file():
            fields: Mapping[str, Any] = read_header(path).fields
            declared = {name: fields.get(f"general.{name.replace('_', '.')}") for name in LICENSE}
        else:
            declared = card_metadata(path / CARD)
    except InputError:  # the base is not there any more
        return {}
    return {name: str(declared[name]) for name in LICENSE if isinstance(declared.get(name), str)}


def card_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a model card; nothing if there is no card, or it has none that can be read."""
    from huggingface_hub import metadata_load

    try:
        return metadata_load(path) or {}
    except Exception:  # whatever YAML or the library says of a card that somebody wrote
        return {}


def hub_datasets(run: Mapping[str, Any]) -> list[str]:
    """The Hub's names of the data sets of a run, as far as they are there.

    >>> hub_datasets({"data": ["alpaca:0.7", "owner/name@v1[train[:9]]", "mine.jsonl", ".../other.json", "nano"]})
    ['tatsu-lab/alpaca', 'owner/name']
    """
    names = (parse_source(text).name for text in _sources(run))
    repos = (DATASETS.get(name, name) for name in names)
    return list(dict.fromkeys(x for x in repos if REPOSITORY.fullmatch(x) and Path(x).suffix not in EXTENSIONS))


def _sources(run: Mapping[str, Any]) -> Iterator[str]:
    """The sources of a run's data, as its recipe names them."""
    if run.get("data"):
        yield from run["data"]
    else:
        yield from filter(None, (run.get("train"), run.get("source")))
