"""Models in the hub's layout, a folder with `config.json` and `model.safetensors`: local, cached, or on the hub.

A model whose weights are quantised has no place in that layout. We write it as a tree, `fgpt.safetensors`, a name that
other libraries do not look for: they say that there are no weights, where they would fill up `model.safetensors` with
random ones. What bitsandbytes has quantised, and transformers saved, is read.
"""

import dataclasses
from importlib.resources import files
from pathlib import Path

import torch

from fgpt.data import tokenizers
from fgpt.errors import InputError
from fgpt.families import gpt2
from fgpt.io.bnb import gathered
from fgpt.io.files import read_json, read_tensors, write, write_json, write_tensors
from fgpt.io.trees import read_tree, write_tree
from fgpt.kernels.quantised import QUANTISED
from fgpt.model import GPT, Config
from fgpt.tree import cast, update, walk

CONFIG, WEIGHTS, TREE = "config.json", "model.safetensors", "fgpt.safetensors"
WANTED = [CONFIG, WEIGHTS, TREE, tokenizers.RANKS, "vocab.json", "generation_config.json"]

EMBEDDED = {"nano": Path(str(files("fgpt") / "nano"))}
"""Models that come with the package."""


def find(name: str) -> Path:
    """The folder of a model: embedded ("nano"), local, or of a hub repository ("gpt2-medium"), downloaded once.

    Raises InputError where there is none, or the hub cannot be reached.
    """
    if name in EMBEDDED:
        return EMBEDDED[name]
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise InputError(f"{name}: no such model folder; expected a folder with {CONFIG} and {WEIGHTS}")
    import huggingface_hub  # here, because importing it takes longer than importing fgpt
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=WANTED, local_files_only=True))
    except HFValidationError:
        raise InputError(f"{name!r} is neither a folder nor a hub name like gpt2-medium or owner/model") from None
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=WANTED, etag_timeout=5))
    except RepositoryNotFoundError:
        raise InputError(f"the hub has no model named {name!r}; check the name, or give a local folder") from None
    except Exception as err:  # whatever the network stack raises, the user's remedy is the same
        raise InputError(
            f"the model {name!r} is not in the local cache and the hub cannot be reached ({type(err).__name__})\n"
            "give a local model with --base FOLDER, or run `just train lora-nano`, which needs no hub"
        ) from None


def describe(name: str) -> tuple[Config, tokenizers.Tokenizer]:
    """A model's config and tokenizer, without its weights.

    Raises InputError for a folder that is not of a known architecture, or whose tokenizer does not fit.
    """
    folder = find(name)
    cfg = _config(folder)
    return cfg, tokenizers.of_folder(folder, cfg.vocab)


def tokenizer(name: str) -> tokenizers.Tokenizer:
    """The tokenizer of a model by name or folder."""
    return describe(name)[1]


def _config(folder: Path) -> Config:
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("model_type") != "gpt2":
        got = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise InputError(f"{folder / CONFIG}: expected model_type 'gpt2', got {got!r}")
    try:
        return gpt2.config_from_hf(config)
    except InputError as err:
        raise InputError(f"{folder}: {err}") from None


def load(name: str, dtype: torch.dtype | None = torch.float32) -> GPT:
    """The params of a model by name or folder, in `dtype`; None keeps what the file has. Quantised weights keep their
    codes and scales, and mean numbers of `dtype`.

    A model that transformers has saved with bitsandbytes' 4 or 8 bits keeps them; its q, k and v are one where a block
    of scales lies across two of them (see `families.gpt2.from_hf`).

    Raises InputError for a folder that is not a whole model of a known architecture.
    """
    folder = find(name)
    cfg = _config(folder)
    params = _read_tree(folder, cfg) if (folder / TREE).exists() else _read_hub(folder, cfg)
    return params if dtype is None else _in(params, dtype)


def _read_hub(folder: Path, cfg: Config) -> GPT:
    stored = read_tensors(folder / WEIGHTS, keep=lambda name: gpt2.plain_name(name) is not None)
    try:
        return gpt2.from_hf(gathered({gpt2.plain_name(name) or name: x for name, x in stored.items()}), cfg)
    except InputError as err:
        raise InputError(f"{folder / WEIGHTS}: {err}") from None


def _read_tree(folder: Path, cfg: Config) -> GPT:
    params = read_tree(folder / TREE)
    try:
        if not isinstance(params, GPT):
            raise InputError(f"expected a GPT, got {type(params).__name__}")
        if params.cfg != cfg:
            raise InputError(f"is a model of {params.cfg}, but {CONFIG} says {cfg}")
        gpt2.check(params)
    except InputError as err:
        raise InputError(f"{folder / TREE}: {err}") from None
    return params


def _in(params: GPT, dtype: torch.dtype) -> GPT:
    held = {path: x for path, x in walk(params) if isinstance(x, QUANTISED)}
    # of a weight and its quantised scales, `update` takes the weight: scales stay fp32
    return cast(update(params, {path: dataclasses.replace(x, dtype=dtype) for path, x in held.items()}), dtype)


def save(params: GPT, folder: Path, like: str | None = None) -> None:
    """Write `params` in the hub's layout, with the tokenizer files of model `like` beside them.

    Tensors are named as GPT2LMHeadModel names them, so that transformers loads the folder as it is. Params with
    quantised weights become a tree of our own, bit by bit, which `load` alone reads.

    Raises InputError for params that still carry adapters.
    """
    config = gpt2.config_to_hf(params.cfg)
    if any(isinstance(x, QUANTISED) for _, x in walk(params)):
        write_tree(folder / TREE, params)
        write_json(folder / CONFIG, config | {"quantization_config": {"quant_method": "fgpt"}})
        (folder / WEIGHTS).unlink(missing_ok=True)
    else:
        tensors = gpt2.to_hf(params)
        named = {name if name == "lm_head.weight" else f"transformer.{name}": x for name, x in tensors.items()}
        write_tensors(folder / WEIGHTS, named)
        write_json(folder / CONFIG, config)
        (folder / TREE).unlink(missing_ok=True)
    source = find(like) if like else None
    for name in (tokenizers.RANKS, "vocab.json"):
        if source and (source / name).exists():
            write(folder / name, (source / name).read_bytes())
