"""Byte-level BPE through tiktoken: GPT-2's own, or a rank file that lies beside a model."""

import base64
import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tiktoken

from fgpt.errors import InputError
from fgpt.library_errors import call
from fgpt.tokenizers import merges
from fgpt.tokenizers.chat_template import CONFIG, ChatTemplate, Messages

RANKS = "ranks.tiktoken"
"""The rank file's name in a model folder: `base64(bytes) rank` lines, as tiktoken has it."""

END = "<|endoftext|>"

GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
"""How GPT-2 cuts text before merging. Source: Radford et al. 2019, section 2.2; possessive as in tiktoken."""

FILE = "tokenizer.json"
"""What the tokenizers library, and so transformers, reads."""

LONG = re.compile(r"\s{10000,}+")
"""Blanks, of which tiktoken remembers each, before a word, as a place to turn back to: of a million it panics."""


@dataclass(frozen=True)
class TiktokenTokenizer:
    """A `Tokenizer` of ranks; <|endoftext|> follows the last and is its one special token."""

    bpe: tiktoken.Encoding
    template: ChatTemplate | None = None
    declared: tuple[int, ...] = ()
    """Further tokens that end a generated text, as the model's config says."""

    @property
    def n_vocab(self) -> int:
        return self.bpe.n_vocab

    @property
    def eos(self) -> int:
        return self.bpe.eot_token

    @property
    def bos(self) -> int:
        return self.bpe.eot_token

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((self.eos, *self.declared)))

    @property
    def end_of_turn(self) -> tuple[int, ...]:
        return (self.eos,)

    @property
    def prefix_tokens(self) -> tuple[int, ...]:
        return ()

    def encode(self, text: str) -> list[int]:
        return _in_parts(self.bpe.encode_ordinary, text)

    def encode_special(self, text: str, around: bool = True) -> list[int]:
        return _in_parts(lambda part: self.bpe.encode(part, allowed_special="all"), text)

    def decode_text(self, tokens: Sequence[int]) -> str:
        return self.decode([token for token in tokens if token != self.eos])

    def decode(self, tokens: Sequence[int]) -> str:
        size = self.n_vocab
        return self.bpe.decode([token for token in tokens if 0 <= token < size])

    def chat(self, messages: Messages, answer: bool = True) -> list[int]:
        if self.template is None:
            raise no_template(self.bpe.name)
        return self.encode_special(self.template.text(messages, answer))

    def files(self) -> dict[str, str]:
        """The files, by name, from which these tokens are read again, by us and by transformers."""
        ranks = [self.bpe.decode_single_token_bytes(rank) for rank in range(self.eos)]
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= {"bos_token": END, "eos_token": END, "unk_token": END}
        config |= {"chat_template": self.template.template} if self.template else {}
        return {RANKS: rank_lines(ranks), FILE: _tokenizer_json(ranks), CONFIG: json.dumps(config, indent=2) + "\n"}

    def with_chat_template(self, template: ChatTemplate | None, declared: Sequence[int] = ()) -> "TiktokenTokenizer":
        """The same tokens with a model's chat template, and what its config says that ends a generated text."""
        return replace(self, template=template, declared=tuple(declared))


def _in_parts(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """`encode(text)`, with each long run of blanks before a word apart.

    The pattern that cuts text gives all of such a run but its last blank to one piece, and begins the next with that:
    so cutting there changes no token.
    """
    tokens: list[int] = []
    start = 0
    for run in LONG.finditer(text) if len(text) > 10_000 else ():
        if run.end() == len(text):  # one piece, all of it
            break
        for part in (text[start : run.start()], text[run.start() : run.end() - 1]):
            tokens += _encoded(encode, part)
        start = run.end() - 1
    return tokens + _encoded(encode, text[start:])


def _encoded(encode: Callable[[str], list[int]], text: str) -> list[int]:
    return call(f"tiktoken fails on a text of {len(text):,} characters: shorten it", lambda: encode(text))


def _tokenizer_json(ranks: list[bytes]) -> str:
    """The same tokens for the tokenizers library. A piece of text that is a token is that token, as in tiktoken."""
    names = [printable(token) for token in ranks]
    pairs = [[printable(left), printable(right)] for left, right in merges.of_ranks(ranks)]
    end = {"id": len(ranks), "content": END, "special": True}
    end |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    cut = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True}
    model |= {"vocab": {name: rank for rank, name in enumerate(names)}, "merges": pairs}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None}
    whole |= {"pre_tokenizer": cut, "post_processor": None, "decoder": cut, "model": model}
    return json.dumps(whole, ensure_ascii=False) + "\n"


def no_template(name: str) -> InputError:
    """What `chat` raises where there is no template."""
    return InputError(
        f"{name}: has no chat template; expected one in tokenizer_config.json, chat_template.jinja or the GGUF file. "
        "Base models have none: use a tuned one, or write the prompt as text"
    )


@functools.cache
def gpt2() -> TiktokenTokenizer:
    """GPT-2's tokenizer: 50,256 ranks and <|endoftext|>. tiktoken fetches the ranks once and keeps them."""
    try:
        return TiktokenTokenizer(tiktoken.get_encoding("gpt2"))
    except Exception as err:
        raise InputError(
            f"GPT-2's ranks could not be fetched ({type(err).__name__}): connect once, or set TIKTOKEN_CACHE_DIR to a "
            "folder that holds them"
        ) from None


def from_ranks(path: Path) -> TiktokenTokenizer:
    """The tokenizer of a rank file, with <|endoftext|> as the token after the last rank.

    Raises InputError for a file that is not one.
    """
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8-sig").splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (OSError, ValueError) as err:
        raise InputError(f"{path}: not a tiktoken rank file (lines of `base64 rank`): {err}") from None
    return _bpe(path, ranks)


def from_vocab(path: Path) -> TiktokenTokenizer:
    """The tokenizer of a `vocab.json` as GPT-2's hub repositories carry it: token to id, bytes in printable stand-ins.

    Raises InputError for a file that is not one.
    """
    try:
        vocab = json.loads(path.read_text(encoding="utf-8-sig"))
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
CHAR_OF_BYTE = {byte: char for char, byte in BYTE_OF_CHAR.items()}


def printable(token: bytes) -> str:
    """A token's bytes as the hub's files write them."""
    return "".join(CHAR_OF_BYTE[byte] for byte in token)


def _bpe(path: Path, ranks: dict[bytes, Any]) -> TiktokenTokenizer:
    if any(type(rank) is not int for rank in ranks.values()) or set(ranks.values()) != set(range(len(ranks))):
        raise InputError(f"{path}: expected every rank from 0 on once; got {len(ranks)} of them, with gaps or repeats")
    if lost := 256 - sum(bytes([b]) in ranks for b in range(256)):
        raise InputError(f"{path}: {lost} of the 256 single bytes have no rank: some texts could not be encoded")
    return TiktokenTokenizer(
        tiktoken.Encoding(str(path), pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={END: len(ranks)})
    )
