"""One small protocol for all tokenizers, and which of them a model has."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fgpt.errors import InputError
from fgpt.tokenizers import chat_template, huggingface, special_tokens
from fgpt.tokenizers.chat_template import Messages
from fgpt.tokenizers.huggingface import HFTokenizer
from fgpt.tokenizers.merges import MERGES, VOCAB
from fgpt.tokenizers.special_tokens import read_json
from fgpt.tokenizers.tiktoken_bpe import END, FILE, RANKS, TiktokenTokenizer, from_ranks, from_vocab, gpt2

FILES = (
    RANKS,
    FILE,
    VOCAB,
    MERGES,
    chat_template.CONFIG,
    chat_template.TEMPLATE,
    special_tokens.MAP,
    special_tokens.ADDED,
    special_tokens.GENERATION,
)
"""What a tokenizer is read from in a model folder, besides config.json: to be fetched and copied with a model."""

GPT2_LIKE = ("gpt2", "gptj", "gpt_neo")
"""Model types that use GPT-2's ranks, so that a folder needs no tokenizer of its own."""

DEFAULTS: dict[str, dict[str, str]] = {
    "GPT2Tokenizer": {"bos_token": END, "eos_token": END, "unk_token": END},
    "GPTNeoXTokenizer": {"bos_token": END, "eos_token": END, "unk_token": END, "pad_token": "<|padding|>"},
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Qwen2Tokenizer": {"eos_token": END, "unk_token": END, "pad_token": END},
}
"""Special tokens of transformers' classes, where a folder's files do not say otherwise."""


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
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a generated text: `eos`, those of the model's config, and what ends a turn in a chat.
        Each is a row of the model's table.
        """
        ...

    @property
    def end_of_turn(self) -> tuple[int, ...]:
        """What the model's chat template writes after an answer, up to the special token that ends the turn; `eos`
        where it writes none, or there is no template.
        """
        ...

    @property
    def prefix_tokens(self) -> tuple[int, ...]:
        """What the model's family puts before every text, such as a BOS."""
        ...

    @property
    def bos(self) -> int:
        """What the first token of a text is predicted from: the BOS token, else `eos`, which ended the text before."""
        ...

    def encode(self, text: str) -> list[int]:
        """`text` as ordinary text: a special token written in it is so many letters. Nothing is put before it or
        after: a family whose texts begin with a BOS token gets it from its chat template, or from whoever calls.
        """
        ...

    def encode_special(self, text: str, around: bool = True) -> list[int]:
        """`text` as transformers' tokenizer reads it: a special token written in it is that token, and with `around`
        those that the family puts around every text are there, such as a BOS.
        """
        ...

    def decode_text(self, tokens: Sequence[int]) -> str:
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

    def files(self) -> Mapping[str, str]:
        """The files, by name, from which this tokenizer is read again, by us and by transformers."""
        ...


def of_folder(folder: Path, vocab: int) -> Tokenizer:
    """The tokenizer of a model folder: its rank file, else its tokenizer.json, else its vocab.json with merges.txt or,
    in GPT-2's layout, alone; else, for models of GPT-2's line, GPT-2's own.

    Tokens beyond the model's table of `vocab` rows are no obstacle while no text holds them.

    Raises InputError where there is none, or the token that ends a document has no row.
    """
    model, kind = read_json(folder / "config.json"), _class_of(folder)
    there = {name for name in FILES if (folder / name).exists()}
    declared = special_tokens.read(folder, DEFAULTS.get(kind, {}))
    template = chat_template.of_folder(folder, declared.config)
    if RANKS in there:
        tokenizer = from_ranks(folder / RANKS)
    elif FILE in there:
        return huggingface.from_json(folder, declared, kind, vocab, template)
    elif {VOCAB, MERGES} <= there and kind == "GPT2Tokenizer":
        return huggingface.from_merges(folder, declared, vocab, template)
    elif (named := model.get("model_type", "gpt2")) not in GPT2_LIKE:
        raise InputError(f"{folder}: no {FILE}; expected it beside a model of type {named!r}")
    elif VOCAB in there:
        tokenizer = from_vocab(folder / VOCAB)
    else:
        tokenizer = gpt2()
    _fits(tokenizer, vocab, str(folder))
    return tokenizer.with_chat_template(template, [x for x in declared.eos_token_ids if x < vocab])


def _class_of(folder: Path) -> str:
    """The class of transformers that reads the folder, without the Fast that older files have at its end."""
    model, config = read_json(folder / "config.json"), read_json(folder / chat_template.CONFIG)
    usual = {**dict.fromkeys(GPT2_LIKE, "GPT2Tokenizer"), "gpt_neox": "GPTNeoXTokenizer"}
    kind = model.get("model_type", "gpt2" if (folder / MERGES).exists() else None)
    named = config.get("tokenizer_class") or model.get("tokenizer_class")
    named = named or (usual.get(kind) if isinstance(kind, str) else None)
    return named.removesuffix("Fast") if isinstance(named, str) else ""


def of_gguf(fields: Mapping[str, Any], vocab: int, name: str = "the GGUF file") -> HFTokenizer:
    """The tokenizer of a GGUF file's metadata; see `huggingface.from_gguf`.

    Raises InputError where they hold none that is known, or the token that ends a document is none of `vocab` rows.
    """
    return huggingface.from_gguf(fields, vocab, name)


def _fits(tokenizer: TiktokenTokenizer, vocab: int, name: str) -> None:
    if tokenizer.n_vocab > vocab:  # the last of its tokens is the one that ends a document
        raise InputError(
            f"the vocabulary does not fit the model: the tokenizer of {name} has {tokenizer.n_vocab} tokens, the model "
            f"{vocab}; put the model's own {RANKS}, {FILE} or {VOCAB} beside it"
        )
