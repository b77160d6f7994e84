"""What a model folder says of its tokenizer beside the vocabulary: special tokens, added ones, and which end a text.

    tokenizer_config.json      names (bos_token, eos_token ..), added_tokens_decoder, add_bos_token, add_prefix_space
    special_tokens_map.json    names, of folders without an added_tokens_decoder
    added_tokens.json          added tokens and their ids, of the same folders
    generation_config.json     eos_token_id: one id or several, each of which ends a generated text
    config.json                the same, where generation_config.json does not say

Read as transformers reads them, so that a token has the id there that it has here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgpt.data.chat import CONFIG, special
from fgpt.errors import InputError, shown

if TYPE_CHECKING:
    import tokenizers

MAP, ADDED, GENERATION = "special_tokens_map.json", "added_tokens.json", "generation_config.json"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names that every tokenizer may have, in the order in which transformers adds what they name."""
EXTRA = ("extra_special_tokens", "additional_special_tokens")
FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


@dataclass(frozen=True)
class Declared:
    """What the files of a folder say of special tokens."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """tokenizer_config.json, with the names of special_tokens_map.json in it."""
    added: tuple[Mapping[str, Any], ...] = ()
    """Added tokens in the order of their ids: content and flags."""
    eos_token_ids: tuple[int, ...] = ()
    """What ends a generated text."""

    @property
    def names(self) -> dict[str, str]:
        """{"bos_token": "<s>", ..}"""
        return special(self.config)

    def flag(self, name: str) -> bool:
        """A setting such as add_bos_token."""
        return self.config.get(name) is True


def read(folder: Path, defaults: Mapping[str, Any]) -> Declared:
    """What `folder` says; `defaults` are names of the tokenizer's class, which its config may change or take away.

    Raises InputError for a file that is not JSON of the right form.
    """
    config = {**defaults, **read_json(folder / CONFIG)}
    if "added_tokens_decoder" in config:
        added = _added_by_id(folder / CONFIG, config["added_tokens_decoder"])
    else:
        names = read_json(folder / MAP)
        older = {key: names.pop(key) for key in EXTRA[1:] if key in names}  # added, but after added_tokens.json is read
        added = _added_by_token(folder / ADDED, read_json(folder / ADDED), config | names)
        config |= names | older
    return Declared(config, added, _eos_token_ids(folder))


def read_json(path: Path) -> dict[str, Any]:
    """What a file says, if it is there."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig")) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as err:
        raise InputError(f"{path}: not valid JSON: {err}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def _added_by_id(path: Path, given: Any) -> tuple[Mapping[str, Any], ...]:
    expected = 'expected added_tokens_decoder to be {"id": {"content": token, ..}, ..}'
    if not isinstance(given, dict):
        raise InputError(f"{path}: {expected}, got {shown(given)}")
    for key, token in given.items():
        if not key.isdecimal() or not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise InputError(f"{path}: {expected}, got {shown({key: token})}")
    return tuple(given[key] for key in sorted(given, key=int))


def _added_by_token(path: Path, given: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    for token, number in given.items():
        if type(number) is not int or number < 0:
            raise InputError(f"{path}: expected the id of each token, got {shown({token: number})}")
    names = {*special(config).values(), *(content(x) for x in _extra(config))}
    return tuple(
        {"content": token, "special": token in names, "normalized": token not in names}
        for token in sorted(given, key=given.__getitem__)
    )


def _extra(config: Mapping[str, Any]) -> list[Any]:
    """Special tokens that have no name."""
    given = next((config[key] for key in EXTRA if config.get(key)), [])
    found = list(given.values()) if isinstance(given, dict) else given
    return [x for x in found if content(x)] if isinstance(found, list) else []


def content(token: Any) -> str:
    """A special token as its text: files have it as a string or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _eos_token_ids(folder: Path) -> tuple[int, ...]:
    for name in (GENERATION, "config.json"):
        given = read_json(folder / name).get("eos_token_id")
        several = given if isinstance(given, list) else [given]
        if found := [x for x in several if type(x) is int and x >= 0]:
            return tuple(dict.fromkeys(found))
    return ()


def add(tokenizer: "tokenizers.Tokenizer", declared: Declared) -> None:
    """Add the declared tokens that `tokenizer` has not, in transformers' order, which gives them their ids."""
    from tokenizers import AddedToken

    def token(given: Any) -> AddedToken:
        if isinstance(given, str):
            return AddedToken(given, special=True)
        return AddedToken(given["content"], **{key: given[key] for key in FLAGS if type(given.get(key)) is bool})

    there = {repr(each) for each in tokenizer.get_added_tokens_decoder().values()}
    contents = {each.content for each in tokenizer.get_added_tokens_decoder().values()}
    wanted = [each for each in map(token, declared.added) if repr(each) not in there]
    names = [key for key in declared.config if key.endswith("_token") and key not in NAMED]
    several = [declared.config.get(key) for key in (*NAMED, *names)] + _extra(declared.config)
    for given in several:
        text = content(given)
        if text and text not in contents and text not in {each.content for each in wanted}:
            wanted.append(token({**given, "special": True} if isinstance(given, dict) else text))
    if wanted:
        tokenizer.add_tokens(wanted)
