"""Tokenizers of the hub's `tokenizers` library: of a folder's tokenizer.json, or its vocab.json and merges.txt, or
rebuilt from a GGUF file's metadata.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgpt.errors import InputError, one_line, shown
from fgpt.library_errors import call
from fgpt.tokenizers import merges, special_tokens
from fgpt.tokenizers.chat_template import CONFIG, ChatTemplate, Messages
from fgpt.tokenizers.child_process import Child
from fgpt.tokenizers.continuation import continuation
from fgpt.tokenizers.special_tokens import GENERATION, DeclaredTokens
from fgpt.tokenizers.tiktoken_bpe import FILE, no_template

if TYPE_CHECKING:
    import tokenizers

SECONDS = 10
"""What reading a tokenizer.json, and using it on a few texts, may take: hundreds of times what those of models do."""
_checker = Child("validation_worker.py", SECONDS)
_checked: set[bytes] = set()
"""Digests of the files that were found well."""


@dataclass(frozen=True, eq=False)
class HFTokenizer:
    """A `Tokenizer` of the `tokenizers` library. `special` names its special tokens: {"bos_token": "<s>", ..}."""

    name: str
    ordinary: "tokenizers.Tokenizer"
    """Reads special tokens in a text as text."""
    n_vocab: int
    rows: int
    """Of the model's table: a token beyond them is no obstacle until a text holds it."""
    eos: int
    declared: tuple[int, ...]
    """Further tokens that end a generated text, as the model's config says."""
    special: Mapping[str, str]
    template: ChatTemplate | None = None

    def encode(self, text: str) -> list[int]:
        return self._ids(self.ordinary, text, False)

    @property
    def bos(self) -> int:
        found = self.ordinary.token_to_id(self.special.get("bos_token", ""))
        return self.eos if found is None or found >= self.rows else found

    @property
    def prefix_tokens(self) -> tuple[int, ...]:
        return self._prefix

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self._ends

    @property
    def end_of_turn(self) -> tuple[int, ...]:
        return self._turn

    @functools.cached_property
    def _prefix(self) -> tuple[int, ...]:
        read = call(self.name, lambda: self.ordinary.encode("a", add_special_tokens=True))
        first = next((i for i, mark in enumerate(read.special_tokens_mask) if not mark), 0)
        return tuple(read.ids[:first])

    @functools.cached_property
    def _ends(self) -> tuple[int, ...]:
        several = (self.eos, *self.declared, self.end_of_turn[-1])
        return tuple(dict.fromkeys(token for token in several if token < min(self.rows, self.n_vocab)))

    @functools.cached_property
    def _turn(self) -> tuple[int, ...]:
        if self.template is None:
            return (self.eos,)
        try:
            after = self.template.after_answer()
            tokens = continuation(lambda text: self.encode_special(text, around=False), "x", after)
        except InputError:  # whoever chats is told
            return (self.eos,)
        marks = {number for number, token in self.ordinary.get_added_tokens_decoder().items() if token.special}
        last = next((i for i, token in enumerate(tokens) if token in marks), None)
        return (self.eos,) if last is None else tuple(tokens[: last + 1])

    def encode_special(self, text: str, around: bool = True) -> list[int]:
        return self._ids(self._parsing, text, around)

    def _ids(self, tokenizer: "tokenizers.Tokenizer", text: str, around: bool) -> list[int]:
        what = f"{self.name}: the tokenizer fails on a text of {len(text):,} characters"
        tokens: list[int] = call(what, lambda: tokenizer.encode(_sound(text), add_special_tokens=around).ids)
        if self.n_vocab > self.rows and tokens and (last := max(tokens)) >= self.rows:
            raise InputError(
                f"{self.name}: the text holds {shown(tokenizer.id_to_token(last))}, token {last}, but the vocabulary "
                f"does not fit the model, which has rows for {self.rows} tokens: take it out of the text, or put the "
                "model's own tokenizer files beside it"
            )
        return tokens

    def decode_text(self, tokens: Sequence[int]) -> str:
        return self._text(tokens, True)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._text(tokens, False)

    def _text(self, tokens: Sequence[int], skip: bool) -> str:
        known = [token for token in tokens if 0 <= token < self.n_vocab]
        what = f"{self.name}: the tokenizer fails on {len(known):,} tokens"
        return call(what, lambda: self.ordinary.decode(known, skip_special_tokens=skip))

    def chat(self, messages: Messages, answer: bool = True) -> list[int]:
        if self.template is None:
            raise no_template(self.name)
        return self.encode_special(self.template.text(messages, answer), around=False)

    def files(self) -> dict[str, str]:
        """The files, by name, from which this tokenizer is read again, by us and by transformers."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self.special}
        config |= {"chat_template": self.template.template} if self.template else {}
        found = {FILE: self.ordinary.to_str(), CONFIG: json.dumps(config, indent=2, ensure_ascii=False) + "\n"}
        if self.declared:
            several = list(dict.fromkeys((self.eos, *self.declared)))
            found[GENERATION] = json.dumps({"eos_token_id": several}, indent=2) + "\n"
        return found

    @functools.cached_property
    def _parsing(self) -> "tokenizers.Tokenizer":
        """Reads special tokens as such: another object, for how they are read is the library's state."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.ordinary.to_str())


def from_json(
    folder: Path, declared: DeclaredTokens, class_name: str, rows: int, template: ChatTemplate | None
) -> HFTokenizer:
    """The tokenizer of a folder's tokenizer.json, with the tokens that its other files declare.

    Raises InputError for a file that is not one, or does harm, or where no token ends a document.
    """
    from tokenizers import Tokenizer, pre_tokenizers

    path = folder / FILE
    _check(path)
    what = f"{path}: not a tokenizer that the tokenizers library reads"
    tokenizer: Any = call(what, lambda: Tokenizer.from_str(path.read_text(encoding="utf-8-sig")))
    if class_name in BYTE_LEVEL and isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        tokenizer.pre_tokenizer.add_prefix_space = declared.flag("add_prefix_space")
    return _of_folder(path, tokenizer, declared, rows, template)


BYTE_LEVEL = ("GPT2Tokenizer", "GPTNeoXTokenizer")
"""Classes of transformers that take add_prefix_space from their config, whatever tokenizer.json says."""


def _check(path: Path) -> None:
    """Raises InputError for a tokenizer.json that fails, crashes or does not end when another process tries it."""
    try:
        digest = hashlib.sha256(path.read_bytes()).digest()
    except OSError as err:
        raise InputError(f"{path}: cannot be read: {err}") from None
    if digest in _checked:
        return
    found = _checker.ask({"path": str(path.absolute())})
    if found is None:
        raise InputError(
            f"{path}: reading it crashes the tokenizers library, or takes more than {_checker.seconds} seconds or too "
            "much memory: fetch the model's own file again"
        )
    if found:
        error = one_line(found["error"])
        raise InputError(f"{path}: not a tokenizer that the tokenizers library reads: {error}")
    _checked.add(digest)


def from_merges(folder: Path, declared: DeclaredTokens, rows: int, template: ChatTemplate | None) -> HFTokenizer:
    """The tokenizer of a folder's vocab.json and merges.txt; see `merges.read`.

    Raises InputError for files that are none, or where no token ends a document.
    """
    return _of_folder(folder / merges.VOCAB, merges.read(folder, declared), declared, rows, template, True)


def _of_folder(
    path: Path,
    tokenizer: "tokenizers.Tokenizer",
    declared: DeclaredTokens,
    rows: int,
    template: ChatTemplate | None,
    complete: bool = False,
) -> HFTokenizer:
    """With the declared tokens that `tokenizer` has not, unless it is `complete`."""
    names, ends = declared.names, [x for x in declared.eos_token_ids if x < rows]
    end = tokenizer.token_to_id(names["eos_token"]) if "eos_token" in names else None
    if not complete:
        special_tokens.add(tokenizer, declared)
    if end is None or end >= rows:  # a name alone, for which the model has no row
        end = next((x for x in ends if tokenizer.id_to_token(x) is not None), None)
    if end is None:
        got = names.get("eos_token", declared.eos_token_ids[0] if declared.eos_token_ids else None)
        raise InputError(
            f"{path}: which token ends a document? expected eos_token in {CONFIG} or eos_token_id in "
            f"{GENERATION} or config.json to name one of its tokens, got {got!r}"
        )
    return _of(str(path), tokenizer, rows, end, ends, names, template)


def from_gguf(fields: Mapping[str, Any], rows: int, name: str) -> HFTokenizer:
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
    end = tokens.index(names["eos_token"])
    if end >= rows:
        raise InputError(
            f"the vocabulary does not fit the model: the tokenizer of {name} ends a document by token {end}, the model "
            f"has {rows} rows; the file is spoiled; fetch it again"
        )
    bos, eos = (fields.get(f"tokenizer.ggml.add_{key}_token") is True for key in ("bos", "eos"))
    merges.around(tokenizer, names, bos, eos, name)
    others = [fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom")]
    ends = [x for x in others if type(x) is int and 0 <= x < min(len(tokens), rows)]
    template = fields.get("tokenizer.chat_template")
    chat = ChatTemplate(template, names) if isinstance(template, str) else None
    return _of(name, tokenizer, rows, end, ends, names, chat)


def _listed(fields: Mapping[str, Any], name: str, key: str, of: type, default: list[Any] | None = None) -> list[Any]:
    found = fields.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(found, list) or not all(isinstance(x, of) for x in found):
        got = type(found).__name__
        raise InputError(f"{name}: tokenizer.ggml.{key}: expected a list of {of.__name__}, got {got}")
    return found


def _merging(tokens: list[str], given: list[str], whole: bool, name: str) -> Any:
    """BPE by `merges`, each two tokens with a space between. Bytes that are no token, as some control characters in
    SmolLM2's vocabulary, are dropped from a text, as by transformers and llama.cpp.
    """
    from tokenizers import models

    pairs: list[tuple[str, str]] = []
    for merge in given:
        left, _, right = merge.partition(" ")
        if not right or " " in right:
            raise InputError(f"{name}: tokenizer.ggml.merges: expected pairs of tokens, got {merge!r}")
        pairs.append((left, right))
    vocab = {token: i for i, token in enumerate(tokens)}
    what = f"{name}: tokenizer.ggml.merges: expected pairs of tokens that make tokens"
    return call(what, lambda: models.BPE(vocab=vocab, merges=pairs, ignore_merges=whole))


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
    name: str,
    tokenizer: "tokenizers.Tokenizer",
    rows: int,
    eos: int,
    ends: Sequence[int],
    names: Mapping[str, str],
    template: ChatTemplate | None,
) -> HFTokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    n_vocab = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    others = tuple(dict.fromkeys(x for x in ends if x != eos))
    return HFTokenizer(name, tokenizer, n_vocab, rows, eos, others, names, template)


def _sound(text: str) -> str:
    """`text` without halves of surrogate pairs, which the library does not take; tiktoken replaces them likewise."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
