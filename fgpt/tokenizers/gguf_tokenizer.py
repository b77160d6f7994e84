"""A tokenizer as the metadata of a GGUF file, `tokenizer.ggml.*`: what `huggingface.from_gguf` and llama.cpp read.

    model, pre                      byte-level BPE, "gpt2", and the name of how text is split before merging
    tokens, token_type, merges      a text for each row of the embedding: NORMAL, CONTROL, USER or UNUSED
    bos_token_id, eos_token_id, ..  special tokens; eot and eom are further ends of a text
    add_bos_token                   whether every text begins with BOS

The file has no place for the way of splitting, only for its name, which llama.cpp knows: a tokenizer that splits in
another way is refused. A normalizer is not written: llama.cpp has none for byte-level BPE, so that a text which is not
in NFC may have other tokens there.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fgpt.errors import InputError
from fgpt.tokenizers.chat_template import TOKENIZER_CONFIG, named_tokens
from fgpt.tokenizers.huggingface import CONTROL, GGUF_NAMES, NORMAL, SPLITS, USER, WHOLE_TOKENS, pre_tokenizer_of
from fgpt.tokenizers.tiktoken_bpe import TOKENIZER_JSON
from fgpt.tokenizers.tokenizer_files import Tokenizer

UNUSED = 5
"""GGUF's type of a row of the embedding that no token has."""
SETTINGS = ("trim_offsets",)
"""Settings of a pre-tokenizer that change no token."""


def to_gguf(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The metadata of a tokenizer, by key.

    Args:
        tokenizer: Byte-level BPE, with one of the known ways of splitting text.
        vocab_size: Rows of the model's embedding: the file has a token for each.

    Raises:
        InputError: for another kind of tokenizer, one of more tokens than rows, and one whose tokens cannot all be
            merged where llama.cpp merges.

    >>> import fgpt
    >>> fields = to_gguf(fgpt.tokenizer("nano"), 4096)
    >>> fields["tokenizer.ggml.pre"], fields["tokenizer.ggml.tokens"][-1]
    ('gpt-2', '<|endoftext|>')
    """
    files = tokenizer.files()
    content, names = json.loads(files[TOKENIZER_JSON]), named_tokens(json.loads(files[TOKENIZER_CONFIG]))
    pre = _split_name(content)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    if bool(content["model"].get("ignore_merges")) != (pre in WHOLE_TOKENS):
        _check_mergeable(content, merges)
    tokens, types = _tokens(content, vocab_size)
    ids = {token: i for i, token in enumerate(tokens)}
    special = {key: ids[names[name]] for name, key in GGUF_NAMES.items() if names.get(name) in ids}
    # llama.cpp takes token 11 for what is missing of these two
    special |= {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    others = [x for x in tokenizer.eos_token_ids if x != tokenizer.eos_token_id]
    special |= dict(zip(("eot", "eom"), others))
    fields: dict[str, Any] = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": merges}
    fields |= {f"{key}_token_id": number for key, number in special.items()}
    fields |= {"add_bos_token": _adds_bos(tokenizer), "add_eos_token": False}
    fields = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    if tokenizer.chat_template is not None:
        fields["tokenizer.chat_template"] = tokenizer.chat_template.template
    return fields


def _split_name(content: Mapping[str, Any]) -> str:
    """The name of the way in which a tokenizer.json splits text. Raises InputError if llama.cpp has none."""
    model = content["model"]
    is_bpe = model.get("type", "BPE") == "BPE" and not model.get("byte_fallback") and model.get("merges")
    for pre in SPLITS if is_bpe else ():
        if _plain(content["pre_tokenizer"]) == _plain(pre_tokenizer_of(pre)):
            return pre
    kind = "its way of splitting text has no name there" if is_bpe else "it is none"
    raise InputError(
        f"a GGUF file is written of byte-level BPE that splits text as {', '.join(SPLITS)}; of this tokenizer {kind}: "
        "convert the model's folder with llama.cpp's convert_hf_to_gguf.py"
    )


def _plain(pre_tokenizer: Any) -> Any:
    """A pre-tokenizer as JSON, without what changes no token."""
    if isinstance(pre_tokenizer, list):
        return [_plain(x) for x in pre_tokenizer]
    if isinstance(pre_tokenizer, dict):
        return {key: _plain(x) for key, x in pre_tokenizer.items() if key not in SETTINGS}
    return pre_tokenizer


def _tokens(content: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """The token of each row and its type."""
    vocab: dict[str, int] = content["model"]["vocab"]
    if vocab and (last := max(vocab.values())) >= vocab_size:
        raise InputError(
            f"the vocabulary does not fit the model: the tokenizer has {last + 1} tokens, the model {vocab_size} rows; "
            "a GGUF file has a row for each"
        )
    rows = {number: (token, NORMAL) for token, number in vocab.items()}
    for token in content["added_tokens"]:
        rows[token["id"]] = (token["content"], CONTROL if token["special"] else USER)
    filled = [rows.get(i, (f"[PAD{i}]", UNUSED)) for i in range(vocab_size)]
    return [token for token, _ in filled], [kind for _, kind in filled]


def _check_mergeable(content: Mapping[str, Any], merges: Sequence[str]) -> None:
    """Raises InputError if a token is not what the merges make of its characters: whether a piece of text that is a
    token becomes it, or what the merges make of it, then matters, and llama.cpp does the other.
    """
    from tokenizers import models

    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    bpe: Any = models.BPE(vocab=content["model"]["vocab"], merges=pairs)
    added = {token["content"] for token in content["added_tokens"]}
    lost = [token for token in content["model"]["vocab"] if token not in added and len(bpe.tokenize(token)) > 1]
    if lost:
        raise InputError(
            f"token {lost[0]!r} cannot be merged ({len(lost)} in all), and llama.cpp takes whole tokens only where "
            "their way of splitting text has it so: a GGUF file would not tokenize as this tokenizer does"
        )


def _adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether every text begins with BOS. Raises InputError for another beginning."""
    if tokenizer.prefix_tokens not in ((), (tokenizer.bos_token_id,)):
        raise InputError(
            f"every text begins with tokens {list(tokenizer.prefix_tokens)}: a GGUF file can say so of BOS alone"
        )
    return bool(tokenizer.prefix_tokens)
