"""One small protocol for all tokenizers, and which of them a model has."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fgpt.data import chat, tokenizer_json
from fgpt.data.chat import Messages
from fgpt.data.ranks import RANKS, from_ranks, from_vocab, gpt2
from fgpt.data.tokenizer_json import HubTokenizer
from fgpt.errors import InputError

VOCAB = "vocab.json"
FILES = (RANKS, tokenizer_json.FILE, VOCAB, chat.CONFIG, chat.TEMPLATE, "generation_config.json")
"""What a tokenizer is read from in a model folder, besides config.json: to be fetched and copied with a model."""

GPT2_LIKE = ("gpt2", "gptj", "gpt_neo")
"""Model types that use GPT-2's ranks, so that a folder needs no tokenizer of its own."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to tokens and back."""

    @property
    def n_vocab(self) -> int:
        """One more than the largest token; a model's table may have more rows."""
        ...

    @property
    def eos(self) -> int:
        """The token that ends a document, or an answer."""
        ...

    @property
    def begin(self) -> int:
        """What the first token of a text is predicted from: the BOS token, else `eos`, which ended the text before."""
        ...

    def encode(self, text: str) -> list[int]:
        """`text` as ordinary text: a special token written in it is so many letters. Nothing is put before it or
        after: a family whose texts begin with a BOS token gets it from its chat template, or from whoever calls.
        """
        ...

    def spelled(self, text: str, around: bool = True) -> list[int]:
        """`text` as transformers' tokenizer reads it: a special token written in it is that token, and with `around`
        those that the family puts around every text are there, such as a BOS.
        """
        ...

    def plain(self, tokens: Sequence[int]) -> str:
        """The text of `tokens` without the special ones."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, special ones written out. Rows of the model's table that are no token have no text."""
        ...

    def chat(self, messages: Messages, answer: bool = True) -> list[int]:
        """`messages` by the model's chat template, special tokens and all; with `answer`, up to where it answers.

        A special token that a message spells out is read as one, as transformers does.

        Raises InputError where there is no template, or it refuses the messages.
        """
        ...


def of_folder(folder: Path, vocab: int) -> Tokenizer:
    """The tokenizer of a model folder: its rank file, else its tokenizer.json, else its vocab.json, else GPT-2's own,
    the last two for models of GPT-2's line alone.

    Raises InputError where there is none, or it has tokens that the model's table of `vocab` rows has not.
    """
    config, model = _json(folder / chat.CONFIG), _json(folder / "config.json")
    template = chat.of_folder(folder, config)
    if (folder / RANKS).exists():
        tokenizer = from_ranks(folder / RANKS).chatting(template)
    elif (folder / tokenizer_json.FILE).exists():
        eos = _json(folder / "generation_config.json").get("eos_token_id", model.get("eos_token_id"))
        eos = eos[0] if isinstance(eos, list) and eos else eos
        tokenizer = tokenizer_json.from_json(
            folder, config, eos if isinstance(eos, int) and 0 <= eos < vocab else None, template
        )
    elif (kind := model.get("model_type", "gpt2")) not in GPT2_LIKE:
        raise InputError(f"{folder}: no {tokenizer_json.FILE}; expected it beside a model of type {kind!r}")
    elif (folder / VOCAB).exists():
        tokenizer = from_vocab(folder / VOCAB).chatting(template)
    else:
        tokenizer = gpt2().chatting(template)
    _fits(tokenizer, vocab, str(folder), f"put the model's own {RANKS}, {tokenizer_json.FILE} or {VOCAB} beside it")
    return tokenizer


def of_gguf(fields: Mapping[str, Any], vocab: int, name: str = "the GGUF file") -> HubTokenizer:
    """The tokenizer of a GGUF file's metadata; see `tokenizer_json.from_gguf`.

    Raises InputError where they hold none that is known, or it has tokens that the table of `vocab` rows has not.
    """
    tokenizer = tokenizer_json.from_gguf(fields, name)
    _fits(tokenizer, vocab, name, "the file is spoiled; fetch it again")
    return tokenizer


def _fits(tokenizer: Tokenizer, vocab: int, name: str, remedy: str) -> None:
    if tokenizer.n_vocab > vocab:
        raise InputError(
            f"the vocabulary does not fit the model: the tokenizer of {name} has {tokenizer.n_vocab} tokens, the model "
            f"{vocab}; {remedy}"
        )


def _json(path: Path) -> dict[str, Any]:
    """What a file says, if it is there."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as err:
        raise InputError(f"{path}: not valid JSON: {err}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found
