"""Byte-level BPE with tiktoken: GPT-2's, or from the rank file of a model folder."""

import base64
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tiktoken

from fgpt.errors import InputError
from fgpt.library_errors import call
from fgpt.tokenizers import merges
from fgpt.tokenizers.chat_template import TOKENIZER_CONFIG, ChatTemplate, Messages

RANKS = "ranks.tiktoken"
"""The name of the rank file in a model folder: `base64(bytes) rank` lines, tiktoken's format."""

END = "<|endoftext|>"

GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
"""How GPT-2 splits text before merging. Source: Radford et al. 2019, section 2.2; possessive as in tiktoken."""

TOKENIZER_JSON = "tokenizer.json"
"""The file that the tokenizers library, and so transformers, reads."""

MIN_LONG_RUN = 10_000
LONG_WHITESPACE = re.compile(rf"\s{{{MIN_LONG_RUN},}}+")
"""tiktoken stores each character of whitespace before a word for backtracking: for a million it panics."""


@dataclass(frozen=True)
class TiktokenTokenizer:
    """A `Tokenizer` of ranks; its special tokens are <|endoftext|>, the token after the last rank, and added ones."""

    bpe: tiktoken.Encoding
    chat_template: ChatTemplate | None = None
    extra_eos_ids: tuple[int, ...] = ()
    """Further tokens that end a generated text, from the model's config."""
    tokens_in_text: frozenset[str] = frozenset()
    """Special tokens that are recognized in ordinary text too."""

    @property
    def n_vocab(self) -> int:
        return self.bpe.n_vocab

    @property
    def eos_token_id(self) -> int:
        return self.bpe.eot_token

    @property
    def bos_token_id(self) -> int:
        return self.bpe.eot_token

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((self.eos_token_id, *self.extra_eos_ids)))

    @property
    def end_of_turn(self) -> tuple[int, ...]:
        return (self.eos_token_id,)

    @property
    def prefix_tokens(self) -> tuple[int, ...]:
        return ()

    def encode(self, text: str) -> list[int]:
        if not self.tokens_in_text:
            return _encode_in_parts(self.bpe.encode_ordinary, text)
        known = set(self.tokens_in_text)
        return _encode_in_parts(lambda part: self.bpe.encode(part, allowed_special=known, disallowed_special=()), text)

    def encode_special(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return _encode_in_parts(lambda part: self.bpe.encode(part, allowed_special="all"), text)

    def encode_batch(self, texts: Sequence[str], *, has_special: bool = False) -> list[list[int]]:
        # tiktoken's own batch hands each text to a thread, which costs more than it gains for texts of a few hundred
        # characters: 2.0 to 2.2 MB/s on two cores, and 4.5 MB/s in this loop.
        encode = self.encode_special if has_special else self.encode
        return [encode(text) for text in texts]

    def decode_text(self, tokens: Sequence[int]) -> str:
        special = set(self.special_ids.values())
        return self.decode([token for token in tokens if token not in special])

    @functools.cached_property
    def special_ids(self) -> dict[str, int]:
        """The special tokens and their ids."""
        ids = {token: self.bpe.encode_single_token(token) for token in self.bpe.special_tokens_set}
        return dict(sorted(ids.items(), key=lambda item: item[1]))

    def decode(self, tokens: Sequence[int]) -> str:
        size = self.n_vocab
        return self.bpe.decode([token for token in tokens if 0 <= token < size])

    def render_chat_template(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        if self.chat_template is None:
            raise no_chat_template(self.bpe.name)
        return self.chat_template.render(messages, add_generation_prompt)

    def apply_chat_template(self, messages: Messages, add_generation_prompt: bool = True) -> list[int]:
        return self.encode_special(self.render_chat_template(messages, add_generation_prompt))

    def files(self) -> dict[str, str]:
        ranks = [self.bpe.decode_single_token_bytes(rank) for rank in range(self.eos_token_id)]
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= {"bos_token": END, "eos_token": END, "unk_token": END}
        if self.chat_template:
            config["chat_template"] = self.chat_template.template
        if self.special_ids.keys() != {END}:
            tokens = {str(number): {"content": token, "special": True} for token, number in self.special_ids.items()}
            config["added_tokens_decoder"] = tokens
        return {
            RANKS: rank_lines(ranks),
            TOKENIZER_JSON: _tokenizer_json(ranks, self.special_ids),
            TOKENIZER_CONFIG: json.dumps(config, indent=2) + "\n",
        }

    def with_tokens(self, tokens: Sequence[str], *, in_text: bool = False) -> "TiktokenTokenizer":
        ids = dict(self.special_ids)
        for token in tokens:
            if token not in ids:
                ids[token] = self._rank_of(token, 1 + max(self.n_vocab - 1, *ids.values()))
        larger = self.with_special_ids(ids)
        return replace(larger, tokens_in_text=self.tokens_in_text | frozenset(tokens)) if in_text else larger

    def _rank_of(self, token: str, default: int) -> int:
        """Its rank, if the token is one of the ranks already."""
        try:
            return self.bpe.encode_single_token(token)
        except KeyError:
            return default

    def with_special_ids(self, ids: Mapping[str, int]) -> "TiktokenTokenizer":
        """The same ranks with these special tokens, <|endoftext|> among them."""
        ranks = {self.bpe.decode_single_token_bytes(rank): rank for rank in range(self.eos_token_id)}
        pattern = self.bpe._pat_str  # pyright: ignore[reportPrivateUsage]
        bpe = tiktoken.Encoding(self.bpe.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=dict(ids))
        return replace(self, bpe=bpe)

    def with_chat_template(
        self, chat_template: ChatTemplate | None, extra_eos_ids: Sequence[int] = ()
    ) -> "TiktokenTokenizer":
        """The same tokenizer with a model's chat template, and further tokens that end a generated text."""
        return replace(self, chat_template=chat_template, extra_eos_ids=tuple(extra_eos_ids))


def _encode_in_parts(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """`encode(text)`, with each long run of whitespace before a word encoded separately.

    The pattern that splits text puts all of such a run except its last character into one piece, and begins the next
    piece with that character: so a split there changes no token.
    """
    if len(text) < MIN_LONG_RUN:
        return _encode_part(encode, text)
    tokens: list[int] = []
    start = 0
    for run in LONG_WHITESPACE.finditer(text):
        if run.end() == len(text):  # a single piece
            break
        for part in (text[start : run.start()], text[run.start() : run.end() - 1]):
            tokens += _encode_part(encode, part)
        start = run.end() - 1
    return tokens + _encode_part(encode, text[start:])


def _encode_part(encode: Callable[[str], list[int]], text: str) -> list[int]:
    return call(f"tiktoken fails on a text of {len(text):,} characters: shorten it", lambda: encode(text))


def _tokenizer_json(ranks: list[bytes], special_ids: Mapping[str, int]) -> str:
    """The same tokenizer for the tokenizers library. A piece of text that is a token is that token, as in tiktoken."""
    names = [printable(token) for token in ranks]
    pairs = [[printable(left), printable(right)] for left, right in merges.merges_from_ranks(ranks)]
    flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": number, "content": token} | flags for token, number in special_ids.items()]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True}
    model |= {"vocab": {name: rank for rank, name in enumerate(names)}, "merges": pairs}
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None}
    content |= {"pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level, "model": model}
    return json.dumps(content, ensure_ascii=False) + "\n"


def no_chat_template(name: str) -> InputError:
    """The error for a tokenizer without a chat template."""
    return InputError(
        f"{name}: has no chat template; expected one in tokenizer_config.json, chat_template.jinja or the GGUF file. "
        "Base models have none: use a chat model, or write the prompt as text"
    )


@functools.cache
def gpt2() -> TiktokenTokenizer:
    """GPT-2's tokenizer: 50,256 ranks and <|endoftext|>. tiktoken downloads the ranks once and caches them.

    Raises:
        InputError: if they cannot be downloaded.
    """
    try:
        return TiktokenTokenizer(tiktoken.get_encoding("gpt2"))
    except Exception as err:
        raise InputError(
            f"GPT-2's ranks could not be downloaded ({type(err).__name__}): connect once, or set TIKTOKEN_CACHE_DIR to "
            "a folder that holds them"
        ) from None


def from_ranks(path: Path) -> TiktokenTokenizer:
    """The tokenizer of a rank file, with <|endoftext|> as the token after the last rank.

    Raises:
        InputError: if it is not a rank file.
    """
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8-sig").splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (OSError, ValueError) as err:
        raise InputError(f"{path}: not a tiktoken rank file (lines of `base64 rank`): {err}") from None
    return _bpe(path, ranks)


def from_vocab(path: Path) -> TiktokenTokenizer:
    """The tokenizer of a GPT-2 `vocab.json`: tokens, with bytes as printable characters, to ids.

    Raises:
        InputError: if it is not such a file.
    """
    try:
        vocab = json.loads(path.read_text(encoding="utf-8-sig"))
        ranks = {bytes(BYTE_OF_CHAR[c] for c in token): rank for token, rank in vocab.items() if token != END}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as err:
        raise InputError(f"{path}: not a byte-level BPE vocabulary (token to id): {err}") from None
    return _bpe(path, ranks)


def write_ranks(ranks: list[bytes], path: Path) -> None:
    """Write a rank file, which `from_ranks` reads.

    Args:
        ranks: The tokens in the order of their ranks.
        path: The file to write.
    """
    path.write_text(rank_lines(ranks))


def rank_lines(ranks: list[bytes]) -> str:
    r"""The content of a rank file, for tokens in the order of their ranks.

    >>> rank_lines([b"a", b"b"])
    'YQ== 0\nYg== 1\n'
    """
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))


def _byte_of_char() -> dict[str, int]:
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()
"""GPT-2's printable characters for bytes: a printable byte is itself, the i-th other byte is chr(256 + i)."""
CHAR_OF_BYTE = {byte: char for char, byte in BYTE_OF_CHAR.items()}


def printable(token: bytes) -> str:
    """A token's bytes as printable characters, as Hugging Face's files write them."""
    return "".join(CHAR_OF_BYTE[byte] for byte in token)


def _bpe(path: Path, ranks: dict[bytes, Any]) -> TiktokenTokenizer:
    if any(type(rank) is not int for rank in ranks.values()) or set(ranks.values()) != set(range(len(ranks))):
        raise InputError(f"{path}: expected every rank from 0 once; got {len(ranks)} ranks, with gaps or repeats")
    if missing := 256 - sum(bytes([b]) in ranks for b in range(256)):
        raise InputError(f"{path}: {missing} of the 256 single bytes have no rank: some texts could not be encoded")
    return TiktokenTokenizer(
        tiktoken.Encoding(str(path), pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={END: len(ranks)})
    )
