"""Byte-level BPE through tiktoken: GPT-2's own, or a rank file that lies beside a model."""

import base64
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tiktoken

from fgpt.data.chat import Chat, Messages
from fgpt.errors import InputError

RANKS = "ranks.tiktoken"
"""The rank file's name in a model folder: `base64(bytes) rank` lines, as tiktoken has it."""

END = "<|endoftext|>"

GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
"""How GPT-2 cuts text before merging. Source: Radford et al. 2019, section 2.2; possessive as in tiktoken."""


@dataclass(frozen=True)
class Ranked:
    """A `Tokenizer` of ranks; <|endoftext|> follows the last and is its one special token."""

    bpe: tiktoken.Encoding
    template: Chat | None = None

    @property
    def n_vocab(self) -> int:
        return self.bpe.n_vocab

    @property
    def eos(self) -> int:
        return self.bpe.eot_token

    @property
    def begin(self) -> int:
        return self.bpe.eot_token

    def encode(self, text: str) -> list[int]:
        return self.bpe.encode_ordinary(text)

    def spelled(self, text: str, around: bool = True) -> list[int]:
        return self.bpe.encode(text, allowed_special="all")

    def plain(self, tokens: Sequence[int]) -> str:
        return self.decode([token for token in tokens if token != self.eos])

    def decode(self, tokens: Sequence[int]) -> str:
        return self.bpe.decode([token for token in tokens if 0 <= token < self.n_vocab])

    def chat(self, messages: Messages, answer: bool = True) -> list[int]:
        if self.template is None:
            raise no_template(self.bpe.name)
        return self.spelled(self.template.text(messages, answer))

    def files(self) -> dict[str, str]:
        """The file, by name, from which these tokens are read again."""
        return {RANKS: rank_lines([self.bpe.decode_single_token_bytes(rank) for rank in range(self.eos)])}

    def chatting(self, template: Chat | None) -> "Ranked":
        """The same tokens with a chat template."""
        return replace(self, template=template)


def no_template(name: str) -> InputError:
    """What `chat` raises where there is no template."""
    return InputError(
        f"{name}: has no chat template; expected one in tokenizer_config.json, chat_template.jinja or the GGUF file. "
        "Base models have none: use a tuned one, or write the prompt as text"
    )


@functools.cache
def gpt2() -> Ranked:
    """GPT-2's tokenizer: 50,256 ranks and <|endoftext|>. tiktoken fetches the ranks once and keeps them."""
    try:
        return Ranked(tiktoken.get_encoding("gpt2"))
    except Exception as err:
        raise InputError(
            f"GPT-2's ranks could not be fetched ({type(err).__name__}): connect once, or set TIKTOKEN_CACHE_DIR to a "
            "folder that holds them"
        ) from None


def from_ranks(path: Path) -> Ranked:
    """The tokenizer of a rank file, with <|endoftext|> as the token after the last rank.

    Raises InputError for a file that is not one.
    """
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (OSError, ValueError) as err:
        raise InputError(f"{path}: not a tiktoken rank file (lines of `base64 rank`): {err}") from None
    return _bpe(path, ranks)


def from_vocab(path: Path) -> Ranked:
    """The tokenizer of a `vocab.json` as GPT-2's hub repositories carry it: token to id, bytes in printable stand-ins.

    Raises InputError for a file that is not one.
    """
    try:
        vocab = json.loads(path.read_text(encoding="utf-8"))
        ranks = {bytes(BYTE_OF_CHAR[c] for c in token): rank for token, rank in vocab.items() if token != END}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as err:
        raise InputError(f"{path}: not a byte-level BPE vocabulary (token to id): {err}") from None
    return _bpe(path, ranks)


def write_ranks(ranks: list[bytes], path: Path) -> None:
    """The inverse of `from_ranks`."""
    path.write_text(rank_lines(ranks))


def rank_lines(ranks: list[bytes]) -> str:
    """What a rank file holds: tokens in the order of their ranks."""
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))


def _byte_of_char() -> dict[str, int]:
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()
"""GPT-2's printable stand-ins: a printable byte stands for itself, the i-th other one is chr(256 + i)."""


def _bpe(path: Path, ranks: dict[bytes, Any]) -> Ranked:
    if any(type(rank) is not int for rank in ranks.values()) or set(ranks.values()) != set(range(len(ranks))):
        raise InputError(f"{path}: expected every rank from 0 on once; got {len(ranks)} of them, with gaps or repeats")
    if lost := 256 - sum(bytes([b]) in ranks for b in range(256)):
        raise InputError(f"{path}: {lost} of the 256 single bytes have no rank: some texts could not be encoded")
    return Ranked(
        tiktoken.Encoding(str(path), pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={END: len(ranks)})
    )
