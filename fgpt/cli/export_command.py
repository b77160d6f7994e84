"""`fgpt export`: a run for other programs, as a folder with a model card that is written whole or not at all.

peft         the adapter in PEFT's format                 merged    a plain model, which transformers reads
gguf         a file of that model, for llama.cpp          ollama    that file and a Modelfile
gguf-lora    a file of the LoRA alone, for llama.cpp      hub       what the training has saved, pushed
"""

import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, NamedTuple, get_args

import torch
from tyro.conf import Positional, arg

from fgpt.cli import run_dir
from fgpt.cli.console import console, show_progress
from fgpt.cli.merge_command import MergeBase, check_merge_base, merge_onto, tokenizer_source
from fgpt.cli.model_card.card import saved_form, write_run_card
from fgpt.cli.model_card.metadata import REPOSITORY, Form, base_license, hub_model
from fgpt.cli.modelfile import model_name, modelfile
from fgpt.cli.tasks import task_type
from fgpt.cli.training.tokenizer import load_tokenizer
from fgpt.data.prompt_templates import NONE, TEMPLATES, Template
from fgpt.data.template_pieces import TemplatePieces, chat_pieces_of, text_pieces
from fgpt.errors import InputError
from fgpt.extras import require_extra
from fgpt.io import models
from fgpt.io.files import atomic_dir, write
from fgpt.io.gguf_adapter import save_gguf_adapter
from fgpt.io.gguf_writer import GGUFType, architecture, save_gguf
from fgpt.io.hub_upload import push_folder
from fgpt.model import GPT
from fgpt.recipes import AnyRecipe, FineTuningRecipe
from fgpt.tokenizers.tokenizer_files import Tokenizer

Target = Literal["peft", "merged", "gguf", "gguf-lora", "ollama", "hub"]
MODEL_FILE, MODELFILE = "model.gguf", "Modelfile"


@dataclass(frozen=True)
class ExportOptions:
    """Export a run for other programs: PEFT, transformers, llama.cpp, Ollama, the Hugging Face Hub."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """The name of a run, or its folder."""
    to: Target | None = None
    """peft: the adapter in PEFT's format. merged: one plain model, which transformers reads. gguf: that model as a file
    for llama.cpp. gguf-lora: the LoRA alone as such a file. ollama: the model's file, and a Modelfile with the prompt
    template. hub: what the training has saved, adapter or model, pushed to a repository in one commit."""
    type: GGUFType | None = None
    """Of the matrices in the file of gguf and ollama: q8_0 and q4_0 are blocks in 8 and in 4 bits. None takes f16."""
    merge_base: MergeBase | None = None
    """Of a quantized base: add the adapter to the dequantized weights that it was trained on, or the original ones."""
    out: Path | None = None
    """The folder to write; None takes export-TARGET in the folder of the run."""
    repo: str | None = None
    """USER/NAME on the Hugging Face Hub, for hub; it is made if it does not exist."""
    private: bool = False
    """Make that repository a private one; without, it is what the owner's repositories are by default."""


class Run(NamedTuple):
    """What is exported."""

    folder: Path
    recipe: AnyRecipe

    @property
    def classes(self) -> tuple[str, ...]:
        return task_type(self.recipe).class_names(self.recipe)

    @property
    def base(self) -> str:
        """As the recipe names it; nothing for a pretraining."""
        return self.recipe.base if isinstance(self.recipe, FineTuningRecipe) else ""

    @property
    def template(self) -> Template:
        """Of its prompts; what is not trained on instructions has none."""
        return TEMPLATES.get(getattr(self.recipe, "template", NONE.name), NONE)

    def tokenizer(self) -> Tokenizer:
        if isinstance(self.recipe, FineTuningRecipe):
            return load_tokenizer(self.recipe).tokenizer
        return models.tokenizer(self.folder / run_dir.MODEL)


def run(options: ExportOptions) -> Path | None:
    """Write the folder, and print what to do with it. Returns it; None if it is pushed.

    Raises InputError for a run that has not finished, a folder that exists, and for what a format does not hold.
    """
    if options.to is None:
        raise InputError(f"nothing to do: give --to {'|'.join(get_args(Target))}")
    folder = run_dir.find_finished(options.run)
    exported = Run(folder, run_dir.read_run(folder))
    _check(options, exported)
    if options.to == "hub":
        push(exported, options.repo or "", private=options.private)
        return None
    kinds = [kind for kind in (options.type, options.merge_base) if kind is not None]
    out = options.out or folder / "-".join(["export", options.to, *kinds])
    if out.exists():
        raise InputError(f"{out} exists: give another --out, or remove it")
    with atomic_dir(out) as partial:
        file = WRITERS[options.to](exported, options, partial)
    advice = ADVICE[options.to].format(file=shlex.quote(str(out / file)), name=model_name(exported.recipe.name))
    console.print(f"saved {out}; {advice}", markup=False, soft_wrap=True)
    return out


def _check(options: ExportOptions, exported: Run) -> None:
    """Raises InputError for options that do not go together, and a missing package, before a model is loaded."""
    has_type, is_merged = options.to in ("gguf", "ollama"), options.to in ("merged", "gguf", "ollama")
    if options.to == "hub" and (options.repo is None or not REPOSITORY.fullmatch(options.repo)):
        raise InputError(f"--repo is {options.repo}: expected USER/NAME for --to hub")
    if options.to == "hub" and options.out is not None:
        raise InputError(f"--out {options.out} is of what is written here: leave it out with --to hub")
    if options.to != "hub" and (options.repo is not None or options.private):
        raise InputError(f"--repo and --private are of hub: leave them out with --to {options.to}")
    if options.type is not None and not has_type:
        raise InputError(f"--type {options.type} is of gguf and ollama: leave it out with --to {options.to}")
    if options.merge_base is not None and not is_merged:
        raise InputError(f"--merge-base {options.merge_base} is of a merged model: leave it out with --to {options.to}")
    if has_type or options.to == "gguf-lora":
        require_extra("gguf", "GGUF files", "gguf")
        if exported.classes:
            raise InputError(f"{exported.folder} is a classifier, which no GGUF file holds: expected a language model")
        config, _ = models.load_config_and_tokenizer(exported.base or exported.folder / run_dir.MODEL)
        architecture(config)  # which llama.cpp has to have
    if is_merged and isinstance(exported.recipe, FineTuningRecipe):
        check_merge_base(options.run, exported.recipe, options.merge_base)


def push(exported: Run, repo: str, *, private: bool) -> None:
    """Push what the training has saved, and print where it is. Raises InputError as `push_folder` does."""
    adapter, model = (exported.folder / name for name in (run_dir.ADAPTER, run_dir.MODEL))
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _copy_saved(exported, model if model.is_dir() else adapter, folder)
        url = push_folder(folder, repo, private=private, message=f"Upload {exported.recipe.name} by fgpt")
    console.print(f"pushed to {url}, in one commit", markup=False, soft_wrap=True)


def _copy_saved(exported: Run, saved: Path, out: Path) -> None:
    """What a training has saved in a folder, with the card of now, which has later results."""
    for path in saved.iterdir():
        if path.is_file():
            shutil.copyfile(path, out / path.name)
    _write_card(exported, out, saved_form(saved))


# -------------------------------------------------------------------------------------------------------------- writers


def write_peft(exported: Run, options: ExportOptions, out: Path) -> str:
    """The files of the adapter."""
    adapter = exported.folder / run_dir.ADAPTER
    if not adapter.is_dir():
        raise InputError(f"{exported.folder} has trained all parameters, and has no adapter: --to merged writes it")
    if saved_form(adapter) != "peft":
        raise InputError(f"PEFT has no format for what {exported.folder} has trained: --to merged writes the model")
    _copy_saved(exported, adapter, out)
    return ""


def write_merged(exported: Run, options: ExportOptions, out: Path) -> str:
    recipe, model = exported.recipe, exported.folder / run_dir.MODEL
    like = tokenizer_source(recipe) if isinstance(recipe, FineTuningRecipe) else model
    models.save(merge_run(exported, options), out, like=like, labels=exported.classes)
    _write_card(exported, out, "transformers")
    return ""


def write_gguf(exported: Run, options: ExportOptions, out: Path) -> str:
    name = f"{exported.recipe.name}-{(options.type or 'f16').upper()}.gguf"
    _write_model_file(exported, options, out / name)
    _write_card(exported, out, "gguf")
    return name


def write_gguf_lora(exported: Run, options: ExportOptions, out: Path) -> str:
    recipe = exported.recipe
    if not isinstance(recipe, FineTuningRecipe) or not (exported.folder / run_dir.ADAPTER).is_dir():
        raise InputError(f"{exported.folder} has trained all parameters, and has no adapter: --to gguf writes it")
    base = task_type(recipe).load_base(recipe)
    adapters = run_dir.load_adapters_of(exported.folder, base)
    name = f"{recipe.name}-LoRA.gguf"
    try:
        save_gguf_adapter(adapters, base, out / name, file_metadata(exported))
    except InputError as err:
        raise InputError(f"{err}; --to gguf does both") from None
    _write_card(exported, out, "gguf-lora")
    return name


def write_ollama(exported: Run, options: ExportOptions, out: Path) -> str:
    tokenizer = exported.tokenizer()
    stops = [tokenizer.decode([token]) for token in tokenizer.eos_token_ids]
    try:
        pieces = template_pieces(exported.template, tokenizer)
    except InputError as err:
        console.print(f"the {MODELFILE} has no TEMPLATE, and Ollama takes one that it knows: {err}", soft_wrap=True)
        pieces = None
    content = modelfile(MODEL_FILE, pieces, stops)
    _write_model_file(exported, options, out / MODEL_FILE)
    write(out / MODELFILE, content)
    _write_card(exported, out, "ollama")
    return MODELFILE


WRITERS: dict[str, Callable[[Run, ExportOptions, Path], str]] = {
    "peft": write_peft,
    "merged": write_merged,
    "gguf": write_gguf,
    "gguf-lora": write_gguf_lora,
    "ollama": write_ollama,
}
"""What writes a folder, and returns the name of the file in it that other programs are given; "" for the folder."""
ADVICE: dict[str, str] = {
    "peft": "PEFT reads it: PeftModel.from_pretrained(base, {file})",
    "merged": "transformers reads it: from_pretrained({file})",
    "gguf": "llama.cpp runs it: llama-cli -m {file}",
    "gguf-lora": "llama.cpp adds it to the base: llama-cli -m BASE.gguf --lora {file}",
    "ollama": "next: ollama create {name} -f {file}",
}


def merge_run(exported: Run, options: ExportOptions) -> GPT:
    """The trained model, plain."""
    recipe = exported.recipe
    if not isinstance(recipe, FineTuningRecipe):
        return models.load(exported.folder / run_dir.MODEL, None)
    with show_progress(f"merging {recipe.name}"):
        trained = run_dir.load_tuned(exported.folder, task_type(recipe).load_base(recipe))
        return merge_onto(recipe, trained, options.merge_base)


def _write_model_file(exported: Run, options: ExportOptions, path: Path) -> None:
    """The trained model as a GGUF file, whose chat template is the prompt template of the training."""
    tokenizer, params = exported.tokenizer(), merge_run(exported, options)
    fields = file_metadata(exported)
    if not exported.template.chat and exported.template != NONE:
        fields["tokenizer.chat_template"] = template_pieces(exported.template, tokenizer).jinja()
    with show_progress(f"writing {path.name}"), torch.no_grad():
        save_gguf(params, path, tokenizer, options.type or "f16", fields)


def template_pieces(template: Template, tokenizer: Tokenizer) -> TemplatePieces:
    """The pieces of a prompt template. Raises InputError for a chat template that has none."""
    if not template.chat:
        return text_pieces(template, tokenizer.decode([tokenizer.eos_token_id]))
    if tokenizer.chat_template is None:
        raise InputError("the base's tokenizer has no chat template any more: expected the one of the training")
    return chat_pieces_of(tokenizer.chat_template, tokenizer.decode(tokenizer.prefix_tokens))


def file_metadata(exported: Run) -> dict[str, Any]:
    """What a GGUF file says of where its model is from."""
    fields: dict[str, Any] = {"general.name": exported.recipe.name}
    for name, value in base_license(exported.base).items() if exported.base else ():
        fields[f"general.{name.replace('_', '.')}"] = value
    if hub := hub_model(exported.base):
        fields |= {
            "general.base_model.count": 1,
            "general.base_model.0.name": hub.rpartition("/")[2],
            "general.base_model.0.repo_url": f"https://huggingface.co/{hub}",
        }
    return fields


def _write_card(exported: Run, out: Path, form: Form) -> None:
    write_run_card(exported.folder, exported.recipe, out, exported.classes, form)
