"""The protocol of all tokenizers, and which tokenizer a model has."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fgpt.errors import InputError, short_repr
from fgpt.tokenizers import chat_template, huggingface, special_tokens
from fgpt.tokenizers.chat_template import ChatTemplate, Messages
from fgpt.tokenizers.huggingface import HFTokenizer
from fgpt.tokenizers.merges import MERGES_TXT, VOCAB_JSON
from fgpt.tokenizers.special_tokens import DeclaredTokens, read_json
from fgpt.tokenizers.tiktoken_bpe import END, RANKS, TOKENIZER_JSON, TiktokenTokenizer, from_ranks, from_vocab, gpt2

FILES = (
    RANKS,
    TOKENIZER_JSON,
    VOCAB_JSON,
    MERGES_TXT,
    chat_template.TOKENIZER_CONFIG,
    chat_template.CHAT_TEMPLATE,
    special_tokens.SPECIAL_TOKENS_MAP,
    special_tokens.ADDED_TOKENS,
    special_tokens.GENERATION_CONFIG,
)
"""The files of a tokenizer in a model folder, besides config.json: they are downloaded and copied with the model."""

GPT2_LIKE = ("gpt2", "gptj", "gpt_neo")
"""Model types with GPT-2's tokenizer, whose folders need no tokenizer files."""

DEFAULTS: dict[str, dict[str, str]] = {
    "GPT2Tokenizer": {"bos_token": END, "eos_token": END, "unk_token": END},
    "GPTNeoXTokenizer": {"bos_token": END, "eos_token": END, "unk_token": END, "pad_token": "<|padding|>"},
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Qwen2Tokenizer": {"eos_token": END, "unk_token": END, "pad_token": END},
}
"""Default special tokens of transformers' classes."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to tokens and back."""

    @property
    def n_vocab(self) -> int:
        """One more than the largest token; a model's embedding may have more rows."""
        ...

    @property
    def eos_token_id(self) -> int:
        """The end-of-sequence token, which ends a document or an answer."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a generated text: `eos_token_id`, those of the model's config, and the end of a turn in
        a chat. Each has a row in the model's embedding.
        """
        ...

    @property
    def end_of_turn(self) -> tuple[int, ...]:
        """The tokens that the chat template writes after an answer, up to the special token that ends the turn;
        `eos_token_id` if it writes none, or there is no chat template.
        """
        ...

    @property
    def prefix_tokens(self) -> tuple[int, ...]:
        """The tokens that the tokenizer puts before every text, such as a BOS token."""
        ...

    @property
    def bos_token_id(self) -> int:
        """The token from which the first token of a text is predicted: BOS, else `eos_token_id`, which ended the text
        before.
        """
        ...

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The model's chat template; None for a base model."""
        ...

    def encode(self, text: str) -> list[int]:
        """The tokens of `text` as ordinary text: special tokens in it are not recognized, and none are added. A model
        whose texts begin with a BOS token gets it from its chat template, or from the caller (`prefix_tokens`).
        """
        ...

    def encode_special(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of `text` as transformers' tokenizer gives them: special tokens in it are recognized, and with
        `add_special_tokens` those of every text are added, such as a BOS token.
        """
        ...

    def encode_batch(self, texts: Sequence[str], *, has_special: bool = False) -> list[list[int]]:
        """The tokens of each text: those of `encode`, or with `has_special` those of `encode_special` without the
        tokens that are added to every text.
        """
        ...

    def decode_text(self, tokens: Sequence[int]) -> str:
        """The text of `tokens` without special tokens."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, with special tokens written out. Ids that are not a token have no text."""
        ...

    def render_chat_template(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """`messages` as text in the model's chat template, special tokens written out.

        Args:
            messages: The conversation.
            add_generation_prompt: End with the beginning of an answer.

        Raises:
            InputError: if there is no chat template, or it refuses the messages.
        """
        ...

    def apply_chat_template(self, messages: Messages, add_generation_prompt: bool = True) -> list[int]:
        """The tokens of `render_chat_template`. A special token in a message is recognized as one, as in transformers.

        Raises:
            InputError: as `render_chat_template` does.
        """
        ...

    def files(self) -> Mapping[str, str]:
        """The content of the files, by name, from which fgpt and transformers load this tokenizer."""
        ...

    def with_tokens(self, tokens: Sequence[str], *, in_text: bool = False) -> "Tokenizer":
        """The same tokenizer with further special tokens, whose ids follow the last one; a token that it has keeps its
        id, and is special from now on. `fgpt.add_tokens` gives them rows in a model as well.

        Args:
            tokens: Each as it stands in a text.
            in_text: `encode` recognizes them too, as transformers does any added token; `files` do not say so.
        """
        ...


def of_folder(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a model folder.

    It is read from the rank file, or else tokenizer.json, or else vocab.json with merges.txt, or else (in GPT-2's
    layout) vocab.json alone. Models with GPT-2's tokenizer need no files.

    Args:
        folder: The model folder.
        vocab_size: Rows of the model's embedding. Tokens beyond them are an error only if a text contains them.

    Raises:
        InputError: if there is no tokenizer, or its end-of-sequence token has no row.
    """
    model, class_name = read_json(folder / "config.json"), _class_name(folder)
    present = {name for name in FILES if (folder / name).exists()}
    declared = special_tokens.read(folder, DEFAULTS.get(class_name, {}))
    template = chat_template.of_folder(folder, declared.config)
    model_type = model.get("model_type", "gpt2")
    if RANKS in present:
        tokenizer = _with_declared(from_ranks(folder / RANKS), declared, folder)
    elif TOKENIZER_JSON in present:
        return huggingface.from_json(folder, declared, class_name, vocab_size, template)
    elif {VOCAB_JSON, MERGES_TXT} <= present and class_name == "GPT2Tokenizer":
        return huggingface.from_merges(folder, declared, vocab_size, template)
    elif model_type not in GPT2_LIKE:
        raise InputError(f"{folder}: no {TOKENIZER_JSON}; expected it in the folder of a model of type {model_type!r}")
    elif VOCAB_JSON in present:
        tokenizer = from_vocab(folder / VOCAB_JSON)
    else:
        tokenizer = gpt2()
    _check_fits(tokenizer, vocab_size, str(folder))
    return tokenizer.with_chat_template(template, [x for x in declared.eos_token_ids if x < vocab_size])


def _with_declared(tokenizer: TiktokenTokenizer, declared: DeclaredTokens, folder: Path) -> TiktokenTokenizer:
    """`tokenizer` with the added tokens of the folder's config.

    Raises InputError if the id of one is that of another token.
    """
    ids = {token["content"]: token["id"] for token in declared.added if "id" in token}
    if ids.keys() <= {END}:
        return tokenizer
    ids = {END: tokenizer.eos_token_id} | ids
    for token, number in ids.items():
        of_text = tokenizer.bpe.decode_single_token_bytes(number) if number < tokenizer.n_vocab else token.encode()
        if of_text != token.encode() or len(set(ids.values())) < len(ids):
            raise InputError(
                f"{folder / chat_template.TOKENIZER_CONFIG}: added token {short_repr(token)} has id {number}, which is "
                f"that of another token of {RANKS}: expected ids from {tokenizer.n_vocab} on, each once"
            )
    return tokenizer.with_special_ids(ids)


def _class_name(folder: Path) -> str:
    """The class of transformers that reads the folder, without the "Fast" at the end of older names."""
    model, config = read_json(folder / "config.json"), read_json(folder / chat_template.TOKENIZER_CONFIG)
    default_classes = {**dict.fromkeys(GPT2_LIKE, "GPT2Tokenizer"), "gpt_neox": "GPTNeoXTokenizer"}
    model_type = model.get("model_type", "gpt2" if (folder / MERGES_TXT).exists() else None)
    name = config.get("tokenizer_class") or model.get("tokenizer_class")
    if not name and isinstance(model_type, str):
        name = default_classes.get(model_type)
    return name.removesuffix("Fast") if isinstance(name, str) else ""


def of_gguf(fields: Mapping[str, Any], vocab_size: int, name: str = "the GGUF file") -> HFTokenizer:
    """The tokenizer of a GGUF file's metadata; see `huggingface.from_gguf`.

    Args:
        fields: The metadata by key.
        vocab_size: Rows of the model's embedding.
        name: The file's name, for error messages.

    Raises:
        InputError: if the metadata hold no known tokenizer, or its end-of-sequence token has no row.
    """
    return huggingface.from_gguf(fields, vocab_size, name)


def _check_fits(tokenizer: TiktokenTokenizer, vocab_size: int, name: str) -> None:
    if tokenizer.n_vocab > vocab_size:  # the last token is the end-of-sequence token
        raise InputError(
            f"the vocabulary does not fit the model: the tokenizer of {name} has {tokenizer.n_vocab} tokens, the model "
            f"{vocab_size}; put the model's own {RANKS}, {TOKENIZER_JSON} or {VOCAB_JSON} into its folder"
        )
