"""The tokenizer files of a model folder apart from the vocabulary: special tokens, added tokens, and end tokens.

    tokenizer_config.json      names (bos_token, eos_token ..), added_tokens_decoder, add_bos_token, add_prefix_space
    special_tokens_map.json    names, in folders without an added_tokens_decoder
    added_tokens.json          added tokens and their ids, in the same folders
    generation_config.json     eos_token_id: one id or several, each of which ends a generated text
    config.json                the same, if generation_config.json does not have it

They are read as transformers reads them, so that every token has the same id.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgpt.errors import InputError, short_repr
from fgpt.tokenizers.chat_template import TOKENIZER_CONFIG, named_tokens

if TYPE_CHECKING:
    import tokenizers

SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
GENERATION_CONFIG = "generation_config.json"
STANDARD_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names that every tokenizer may have, in the order in which transformers adds their tokens."""
EXTRA = ("extra_special_tokens", "additional_special_tokens")
"""Lists of special tokens without a name."""
FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
"""Options of an added token."""


@dataclass(frozen=True)
class DeclaredTokens:
    """The special tokens that a model folder declares."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """The content of tokenizer_config.json, with the names of special_tokens_map.json added."""
    added: tuple[Mapping[str, Any], ...] = ()
    """Added tokens in the order of their ids: content and options, and the id if the folder has it."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a generated text."""

    @property
    def names(self) -> dict[str, str]:
        """{"bos_token": "<s>", ..}"""
        return named_tokens(self.config)

    def flag(self, name: str) -> bool:
        """A setting such as add_bos_token; False by default."""
        return self.config.get(name) is True


def read(folder: Path, defaults: Mapping[str, Any]) -> DeclaredTokens:
    """The special tokens that `folder` declares.

    Args:
        folder: The model folder.
        defaults: The special tokens of the tokenizer's class, which the folder's config may change or remove.

    Raises:
        InputError: for a file that is not JSON of the right form.
    """
    config = {**defaults, **read_json(folder / TOKENIZER_CONFIG)}
    if "added_tokens_decoder" in config:
        added = _added_by_id(folder / TOKENIZER_CONFIG, config["added_tokens_decoder"])
    else:
        names = read_json(folder / SPECIAL_TOKENS_MAP)
        older = {key: names.pop(key) for key in EXTRA[1:] if key in names}  # added last
        added = _added_by_token(folder / ADDED_TOKENS, read_json(folder / ADDED_TOKENS), config | names)
        config |= names | older
    return DeclaredTokens(config, added, _eos_token_ids(folder))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file does not exist.

    Raises:
        InputError: for anything but a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig")) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as err:
        raise InputError(f"{path}: not valid JSON: {err}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _added_by_id(path: Path, decoder: Any) -> tuple[Mapping[str, Any], ...]:
    expected = 'expected added_tokens_decoder to be {"id": {"content": token, ..}, ..}'
    if not isinstance(decoder, dict):
        raise InputError(f"{path}: {expected}, got {short_repr(decoder)}")
    for key, token in decoder.items():
        if not key.isdecimal() or not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise InputError(f"{path}: {expected}, got {short_repr({key: token})}")
    return tuple(decoder[key] | {"id": int(key)} for key in sorted(decoder, key=int))


def _added_by_token(path: Path, ids: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    for token, number in ids.items():
        if type(number) is not int or number < 0:
            raise InputError(f"{path}: expected the id of each token, got {short_repr({token: number})}")
    special = {*named_tokens(config).values(), *(token_content(token) for token in _extra_tokens(config))}
    return tuple(
        {"content": token, "special": token in special, "normalized": token not in special}
        for token in sorted(ids, key=ids.__getitem__)
    )


def _extra_tokens(config: Mapping[str, Any]) -> list[Any]:
    """Special tokens without a name."""
    tokens = next((config[key] for key in EXTRA if config.get(key)), [])
    if isinstance(tokens, dict):
        tokens = list(tokens.values())
    return [token for token in tokens if token_content(token)] if isinstance(tokens, list) else []


def token_content(token: Any) -> str:
    """A special token as its text: files have it as a string or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _eos_token_ids(folder: Path) -> tuple[int, ...]:
    for name in (GENERATION_CONFIG, "config.json"):
        value = read_json(folder / name).get("eos_token_id")
        values = value if isinstance(value, list) else [value]
        if ids := [x for x in values if type(x) is int and x >= 0]:
            return tuple(dict.fromkeys(ids))
    return ()


def add(tokenizer: "tokenizers.Tokenizer", declared: DeclaredTokens) -> None:
    """Add the declared tokens that `tokenizer` lacks, in place, in transformers' order, which determines their ids."""
    existing = list(tokenizer.get_added_tokens_decoder().values())
    reprs = {repr(token) for token in existing}
    added = [token for token in map(_added_token, declared.added) if repr(token) not in reprs]
    contents = {token.content for token in (*existing, *added)}
    other_names = [key for key in declared.config if key.endswith("_token") and key not in STANDARD_NAMES]
    special = [declared.config.get(key) for key in (*STANDARD_NAMES, *other_names)] + _extra_tokens(declared.config)
    for token in special:
        content = token_content(token)
        if content and content not in contents:
            added.append(_added_token({**token, "special": True} if isinstance(token, dict) else content))
            contents.add(content)
    if added:
        tokenizer.add_tokens(added)


def _added_token(token: Any) -> "tokenizers.AddedToken":
    from tokenizers import AddedToken

    if isinstance(token, str):
        return AddedToken(token, special=True)
    return AddedToken(token["content"], **{key: token[key] for key in FLAGS if type(token.get(key)) is bool})
