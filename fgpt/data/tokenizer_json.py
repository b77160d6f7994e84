"""Tokenizers of the hub's `tokenizers` library: a folder's tokenizer.json, or rebuilt from a GGUF file's metadata."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgpt.data.chat import CONFIG, Chat, Messages, special
from fgpt.data.ranks import no_template
from fgpt.errors import InputError, one_line

if TYPE_CHECKING:
    import tokenizers

FILE = "tokenizer.json"


@dataclass(frozen=True, eq=False)
class HubTokenizer:
    """A `Tokenizer` of the `tokenizers` library. `special` names its special tokens: {"bos_token": "<s>", ..}."""

    name: str
    ordinary: "tokenizers.Tokenizer"
    """Reads special tokens in a text as text."""
    n_vocab: int
    eos: int
    special: Mapping[str, str]
    template: Chat | None = None

    def encode(self, text: str) -> list[int]:
        return self.ordinary.encode(_sound(text), add_special_tokens=False).ids

    @property
    def begin(self) -> int:
        found = self.ordinary.token_to_id(self.special.get("bos_token", ""))
        return self.eos if found is None else found

    def spelled(self, text: str, around: bool = True) -> list[int]:
        return self._parsing.encode(_sound(text), add_special_tokens=around).ids

    def plain(self, tokens: Sequence[int]) -> str:
        return self.ordinary.decode(self._known(tokens), skip_special_tokens=True)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.ordinary.decode(self._known(tokens), skip_special_tokens=False)

    def _known(self, tokens: Sequence[int]) -> list[int]:
        return [token for token in tokens if 0 <= token < self.n_vocab]

    def chat(self, messages: Messages, answer: bool = True) -> list[int]:
        if self.template is None:
            raise no_template(self.name)
        return self.spelled(self.template.text(messages, answer), around=False)

    def files(self) -> dict[str, str]:
        """The files, by name, from which this tokenizer is read again, by us and by transformers."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self.special}
        config |= {"chat_template": self.template.template} if self.template else {}
        return {FILE: self.ordinary.to_str(), CONFIG: json.dumps(config, indent=2, ensure_ascii=False) + "\n"}

    @functools.cached_property
    def _parsing(self) -> "tokenizers.Tokenizer":
        """Reads special tokens as such: another object, for how they are read is the library's state."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.ordinary.to_str())


def from_json(folder: Path, config: Mapping[str, Any], eos: int | None, template: Chat | None) -> HubTokenizer:
    """The tokenizer of a folder's tokenizer.json; its end is what `config` (tokenizer_config.json) calls eos_token,
    else `eos`.

    Raises InputError for a file that is not one, or where no token ends a document.
    """
    from tokenizers import Tokenizer

    path = folder / FILE
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as err:  # the library raises nothing narrower
        raise InputError(f"{path}: not a tokenizer that the tokenizers library reads: {one_line(err)}") from None
    names = special(config)
    end = tokenizer.token_to_id(names["eos_token"]) if "eos_token" in names else eos
    if end is None or tokenizer.id_to_token(end) is None:
        raise InputError(
            f"{path}: which token ends a document? expected eos_token in {CONFIG} or eos_token_id in "
            f"generation_config.json or config.json to name one of its tokens, got {names.get('eos_token', eos)!r}"
        )
    return _of(str(path), tokenizer, end, names, template)


def from_gguf(fields: Mapping[str, Any], name: str) -> HubTokenizer:
    """The tokenizer that a GGUF file's metadata describe: byte-level BPE with merges (`tokenizer.ggml.model` gpt2).

    How text is cut before merging is named by `tokenizer.ggml.pre`, and not written down: those in `SPLITS` are known.
    SentencePiece's vocabularies (`llama`) carry scores and no merges, from which its order of merging is not rebuilt
    exactly here.

    Raises InputError for another kind, a way of cutting that is not known, or metadata that do not fit together.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers

    if (kind := fields.get("tokenizer.ggml.model")) != "gpt2":
        raise InputError(
            f"{name}: tokenizer.ggml.model is {kind!r}; expected 'gpt2' (byte-level BPE): for others, give the model's "
            f"hub folder with its {FILE}"
        )
    pre = fields.get("tokenizer.ggml.pre")
    if pre in (None, "default") and fields.get("general.architecture") == "gpt2":
        pre = "gpt-2"  # files from before the key; what GPT-2 does is beyond doubt
    if not isinstance(pre, str) or pre not in SPLITS:
        raise InputError(
            f"{name}: tokenizer.ggml.pre, the way of cutting text, is {pre!r}; expected one of {', '.join(SPLITS)}: "
            f"for others, give the model's hub folder with its {FILE}"
        )
    tokens = _listed(fields, name, "tokens", str)
    types = _listed(fields, name, "token_type", int, [NORMAL] * len(tokens))
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise InputError(
            f"{name}: expected {len(tokens)} tokens, each once and with a token_type; got {len(set(tokens))} different "
            f"ones and {len(types)} types"
        )
    tokenizer = Tokenizer(_merging(tokens, _listed(fields, name, "merges", str), pre in WHOLE, name))
    if pre in NFC:
        tokenizer.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = _cutting(pre)
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    marked = [(token, kind == CONTROL) for token, kind in zip(tokens, types) if kind in (CONTROL, USER)]
    tokenizer.add_tokens([AddedToken(token, special=control, normalized=False) for token, control in marked])

    ids = {key: fields.get(f"tokenizer.ggml.{own}_token_id") for key, own in NAMES.items()}
    names = {key: tokens[i] for key, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    if "eos_token" not in names:
        raise InputError(
            f"{name}: tokenizer.ggml.eos_token_id, the token that ends a document: expected one of the "
            f"{len(tokens)} tokens, got {ids['eos_token']}"
        )
    template = fields.get("tokenizer.chat_template")
    chat = Chat(template, names) if isinstance(template, str) else None
    return _of(name, tokenizer, tokens.index(names["eos_token"]), names, chat)


def _listed(fields: Mapping[str, Any], name: str, key: str, of: type, default: list[Any] | None = None) -> list[Any]:
    found = fields.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(found, list) or not all(isinstance(x, of) for x in found):
        got = type(found).__name__
        raise InputError(f"{name}: tokenizer.ggml.{key}: expected a list of {of.__name__}, got {got}")
    return found


def _merging(tokens: list[str], merges: list[str], whole: bool, name: str) -> Any:
    """BPE by `merges`, each two tokens with a space between. Bytes that are no token, as some control characters in
    SmolLM2's vocabulary, are dropped from a text, as by transformers and llama.cpp.
    """
    from tokenizers import models

    pairs: list[tuple[str, str]] = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not right or " " in right:
            raise InputError(f"{name}: tokenizer.ggml.merges: expected pairs of tokens, got {merge!r}")
        pairs.append((left, right))
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        return models.BPE(vocab=vocab, merges=pairs, ignore_merges=whole)
    except Exception as err:  # the library raises nothing narrower
        raise InputError(
            f"{name}: tokenizer.ggml.merges: expected pairs of tokens that make tokens, got {one_line(err)}"
        ) from None


NORMAL, CONTROL, USER = 1, 3, 4
"""GGUF's types of tokens: others are never met in a text."""
NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
GPT2 = None
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS = {
    "gpt-2": GPT2,
    "smollm": GPT2,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
}
"""How the tokenizers that llama.cpp names cut text: as the tokenizer.json of their models say. None is GPT-2's way."""
DIGITS = {"smollm"}
"""Digits are cut apart first."""
WHOLE = {"llama-bpe", "llama3", "llama-v3"}
"""A piece that is a token as it is needs no merges."""
NFC = {"qwen2", "deepseek-r1-qwen"}


def _cutting(pre: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    split = SPLITS[pre]
    if split is None:
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), whole]) if pre in DIGITS else whole
    cut = pre_tokenizers.Split(Regex(split), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _of(
    name: str, tokenizer: "tokenizers.Tokenizer", eos: int, names: Mapping[str, str], template: Chat | None
) -> HubTokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    n_vocab = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    return HubTokenizer(name, tokenizer, n_vocab, eos, names, template)


def _sound(text: str) -> str:
    """`text` without halves of surrogate pairs, which the library does not take; tiktoken replaces them likewise."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
