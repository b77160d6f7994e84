"""Tokenizers of Hugging Face's `tokenizers` library: from a folder's tokenizer.json, or its vocab.json and merges.txt,
or rebuilt from the metadata of a GGUF file.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgpt.errors import InputError, one_line, short_repr
from fgpt.library_errors import call
from fgpt.tokenizers import merges, special_tokens
from fgpt.tokenizers.chat_template import TOKENIZER_CONFIG, ChatTemplate, Messages
from fgpt.tokenizers.child_process import Child
from fgpt.tokenizers.continuation import continuation_tokens
from fgpt.tokenizers.special_tokens import GENERATION_CONFIG, DeclaredTokens
from fgpt.tokenizers.tiktoken_bpe import TOKENIZER_JSON, no_chat_template

if TYPE_CHECKING:
    import tokenizers

SECONDS = 10
"""Time limit for reading a tokenizer.json and using it on a few texts: hundreds of times what those of models take."""
_checker = Child("validation_worker.py", SECONDS)
_valid_files: set[bytes] = set()
"""Digests of the files that passed the check."""


@dataclass(frozen=True, eq=False)
class HFTokenizer:
    """A `Tokenizer` of the `tokenizers` library."""

    name: str
    tokenizer: "tokenizers.Tokenizer"
    """Encodes special tokens in a text as ordinary text."""
    n_vocab: int
    vocab_size: int
    """Rows of the model's embedding: a token beyond them is an error only if a text contains it."""
    eos_token_id: int
    extra_eos_ids: tuple[int, ...]
    """Further tokens that end a generated text, from the model's config."""
    special_tokens: Mapping[str, str]
    """The special tokens by name: {"bos_token": "<s>", ..}."""
    chat_template: ChatTemplate | None = None
    tokens_in_text: frozenset[int] = frozenset()
    """Special tokens that are recognized in ordinary text too: in `tokenizer` they are added tokens, not special."""

    def encode(self, text: str) -> list[int]:
        return self._encode(self.tokenizer, text, False)

    @property
    def bos_token_id(self) -> int:
        bos = self.tokenizer.token_to_id(self.special_tokens.get("bos_token", ""))
        return self.eos_token_id if bos is None or bos >= self.vocab_size else bos

    @property
    def prefix_tokens(self) -> tuple[int, ...]:
        return self._prefix_tokens

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self._eos_token_ids

    @property
    def end_of_turn(self) -> tuple[int, ...]:
        return self._end_of_turn

    @functools.cached_property
    def _prefix_tokens(self) -> tuple[int, ...]:
        encoding = call(self.name, lambda: self.tokenizer.encode("a", add_special_tokens=True))
        first = next((i for i, is_special in enumerate(encoding.special_tokens_mask) if not is_special), 0)
        return tuple(encoding.ids[:first])

    @functools.cached_property
    def _eos_token_ids(self) -> tuple[int, ...]:
        ids = dict.fromkeys((self.eos_token_id, *self.extra_eos_ids, self.end_of_turn[-1]))
        return tuple(token for token in ids if token < min(self.vocab_size, self.n_vocab))

    @functools.cached_property
    def _end_of_turn(self) -> tuple[int, ...]:
        if self.chat_template is None:
            return (self.eos_token_id,)
        try:
            suffix = self.chat_template.answer_suffix()
            tokens = continuation_tokens(lambda text: self.encode_special(text, add_special_tokens=False), "x", suffix)
        except InputError:  # the template's fault is reported when it is used for a chat
            return (self.eos_token_id,)
        added = self.tokenizer.get_added_tokens_decoder()
        special = {number for number, token in added.items() if token.special} | self.tokens_in_text
        first = next((i for i, token in enumerate(tokens) if token in special), None)
        return (self.eos_token_id,) if first is None else tuple(tokens[: first + 1])

    def encode_special(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._encode(self._special_tokenizer, text, add_special_tokens)

    def _encode(self, tokenizer: "tokenizers.Tokenizer", text: str, add_special_tokens: bool) -> list[int]:
        error = f"{self.name}: the tokenizer fails on a text of {len(text):,} characters"
        valid = _replace_surrogates(text)
        tokens: list[int] = call(error, lambda: tokenizer.encode(valid, add_special_tokens=add_special_tokens).ids)
        if self.n_vocab > self.vocab_size and tokens and (last := max(tokens)) >= self.vocab_size:
            raise InputError(
                f"{self.name}: the text holds {short_repr(tokenizer.id_to_token(last))}, token {last}, but the "
                f"vocabulary does not fit the model, which has rows for {self.vocab_size} tokens: remove it from the "
                "text, or put the model's own tokenizer files into its folder"
            )
        return tokens

    def encode_batch(self, texts: Sequence[str], *, has_special: bool = False) -> list[list[int]]:
        tokenizer = self._special_tokenizer if has_special else self.tokenizer
        valid = [_replace_surrogates(text) for text in texts]
        try:
            encodings = call(self.name, lambda: tokenizer.encode_batch_fast(valid, add_special_tokens=False))
            tokens = [encoding.ids for encoding in encodings]
            if self.n_vocab <= self.vocab_size or max(map(max, filter(None, tokens)), default=0) < self.vocab_size:
                return tokens
        except InputError:
            pass
        return [self._encode(tokenizer, text, False) for text in texts]  # its error says which text

    def decode_text(self, tokens: Sequence[int]) -> str:
        return self._decode([token for token in tokens if token not in self.tokens_in_text], True)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._decode(tokens, False)

    def _decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        known = [token for token in tokens if 0 <= token < self.n_vocab]
        error = f"{self.name}: the tokenizer fails on {len(known):,} tokens"
        return call(error, lambda: self.tokenizer.decode(known, skip_special_tokens=skip_special_tokens))

    def render_chat_template(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        if self.chat_template is None:
            raise no_chat_template(self.name)
        return self.chat_template.render(messages, add_generation_prompt)

    def apply_chat_template(self, messages: Messages, add_generation_prompt: bool = True) -> list[int]:
        text = self.render_chat_template(messages, add_generation_prompt)
        return self.encode_special(text, add_special_tokens=False)

    def files(self) -> dict[str, str]:
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= self.special_tokens
        if self.chat_template:
            config["chat_template"] = self.chat_template.template
        files = {
            TOKENIZER_JSON: self._to_str(),
            TOKENIZER_CONFIG: json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        }
        if self.extra_eos_ids:
            eos_token_ids = list(dict.fromkeys((self.eos_token_id, *self.extra_eos_ids)))
            files[GENERATION_CONFIG] = json.dumps({"eos_token_id": eos_token_ids}, indent=2) + "\n"
        return files

    def _to_str(self) -> str:
        """The JSON of the tokenizer, in which every special token is one."""
        content = json.loads(self.tokenizer.to_str())
        for token in content["added_tokens"]:
            token["special"] = token["special"] or token["id"] in self.tokens_in_text
        return json.dumps(content, ensure_ascii=False)

    def with_tokens(self, tokens: Sequence[str], *, in_text: bool = False) -> "HFTokenizer":
        from tokenizers import AddedToken, Tokenizer

        tokenizer: Any = Tokenizer.from_str(self.tokenizer.to_str())
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        added = [AddedToken(x, special=not in_text, normalized=False) for x in tokens if in_text or x not in known]
        call(f"{self.name}: the tokenizer takes no new tokens", lambda: tokenizer.add_tokens(added))
        if in_text:
            larger = replace(self, tokens_in_text=self.tokens_in_text.union(map(tokenizer.token_to_id, tokens)))
            return larger._with(tokenizer)
        return self._with(tokenizer)

    def _with(self, tokenizer: Any) -> "HFTokenizer":
        tokenizer.encode_special_tokens = True
        n_vocab = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        vocab_size = self.vocab_size if n_vocab == self.n_vocab else max(n_vocab, self.vocab_size)
        return replace(self, tokenizer=tokenizer, n_vocab=n_vocab, vocab_size=vocab_size)

    @functools.cached_property
    def _special_tokenizer(self) -> "tokenizers.Tokenizer":
        """Encodes special tokens in a text as special tokens. A second object, because that is state in the library."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.tokenizer.to_str())


def from_json(
    folder: Path, declared: DeclaredTokens, class_name: str, vocab_size: int, template: ChatTemplate | None
) -> HFTokenizer:
    """The tokenizer of a folder's tokenizer.json.

    Args:
        folder: The model folder.
        declared: Special tokens and settings of its other files.
        class_name: The class of transformers that reads the folder, without "Fast".
        vocab_size: Rows of the model's embedding.
        template: Its chat template.

    Raises:
        InputError: for a malformed or harmful file, and if no token ends a document.
    """
    from tokenizers import Tokenizer, pre_tokenizers

    path = folder / TOKENIZER_JSON
    check_file(path)
    error = f"{path}: not a tokenizer that the tokenizers library reads"
    tokenizer: Any = call(error, lambda: Tokenizer.from_str(path.read_text(encoding="utf-8-sig")))
    if class_name in BYTE_LEVEL and isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        tokenizer.pre_tokenizer.add_prefix_space = declared.flag("add_prefix_space")
    return _with_eos(path, tokenizer, declared, vocab_size, template, add_declared=True)


BYTE_LEVEL = ("GPT2Tokenizer", "GPTNeoXTokenizer")
"""Classes of transformers that take add_prefix_space from their config, and not from tokenizer.json."""


def check_file(path: Path) -> None:
    """Raises InputError for a tokenizer.json that fails, crashes or takes too long when another process uses it."""
    try:
        digest = hashlib.sha256(path.read_bytes()).digest()
    except OSError as err:
        raise InputError(f"{path}: cannot be read: {err}") from None
    if digest in _valid_files:
        return
    response = _checker.ask({"path": str(path.absolute())})
    if response is None:
        raise InputError(
            f"{path}: reading it crashes the tokenizers library, or takes more than {_checker.seconds} seconds or too "
            "much memory: download the model's own file again"
        )
    if response:
        error = one_line(response["error"])
        raise InputError(f"{path}: not a tokenizer that the tokenizers library reads: {error}")
    _valid_files.add(digest)


def from_merges(folder: Path, declared: DeclaredTokens, vocab_size: int, template: ChatTemplate | None) -> HFTokenizer:
    """The tokenizer of a folder's vocab.json and merges.txt; see `merges.read`, and `from_json` for the arguments.

    Raises:
        InputError: for malformed files, and if no token ends a document.
    """
    return _with_eos(folder / merges.VOCAB_JSON, merges.read(folder, declared), declared, vocab_size, template)


def _with_eos(
    path: Path,
    tokenizer: "tokenizers.Tokenizer",
    declared: DeclaredTokens,
    vocab_size: int,
    template: ChatTemplate | None,
    add_declared: bool = False,
) -> HFTokenizer:
    """`tokenizer` with the declared end-of-sequence token, and with `add_declared` the declared tokens it lacks."""
    names, eos_token_ids = declared.names, [x for x in declared.eos_token_ids if x < vocab_size]
    eos = tokenizer.token_to_id(names["eos_token"]) if "eos_token" in names else None
    if add_declared:
        special_tokens.add(tokenizer, declared)
    if eos is None or eos >= vocab_size:  # only a name, without a row in the model's embedding
        eos = next((x for x in eos_token_ids if tokenizer.id_to_token(x) is not None), None)
    if eos is None:
        got = names.get("eos_token", declared.eos_token_ids[0] if declared.eos_token_ids else None)
        raise InputError(
            f"{path}: which token ends a document? expected eos_token in {TOKENIZER_CONFIG} or eos_token_id in "
            f"{GENERATION_CONFIG} or config.json to name one of its tokens, got {got!r}"
        )
    return _hf_tokenizer(str(path), tokenizer, vocab_size, eos, eos_token_ids, names, template)


def from_gguf(fields: Mapping[str, Any], vocab_size: int, name: str) -> HFTokenizer:
    """The tokenizer in a GGUF file's metadata: byte-level BPE with merges (`tokenizer.ggml.model` gpt2).

    `tokenizer.ggml.pre` names how text is split before merging, and does not describe it: the names in `SPLITS` are
    known. SentencePiece vocabularies (`llama`) have scores and no merges, from which the order of merging cannot be
    rebuilt exactly here.

    Args:
        fields: The metadata by key.
        vocab_size: Rows of the model's embedding.
        name: The file's name, for error messages.

    Raises:
        InputError: for another kind of tokenizer, an unknown split, or inconsistent metadata.
    """
    if (kind := fields.get("tokenizer.ggml.model")) != "gpt2":
        raise InputError(
            f"{name}: tokenizer.ggml.model is {kind!r}; expected 'gpt2' (byte-level BPE): for others, give the model's "
            f"folder from the hub with its {TOKENIZER_JSON}"
        )
    pre = fields.get("tokenizer.ggml.pre")
    if pre in (None, "default") and fields.get("general.architecture") == "gpt2":
        pre = "gpt-2"  # files older than the key
    if not isinstance(pre, str) or pre not in SPLITS:
        raise InputError(
            f"{name}: tokenizer.ggml.pre, the way to split text, is {pre!r}; expected one of {', '.join(SPLITS)}: for "
            f"others, give the model's folder from the hub with its {TOKENIZER_JSON}"
        )
    tokens = _require_list(fields, name, "tokens", str)
    types = _require_list(fields, name, "token_type", int, [NORMAL] * len(tokens))
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise InputError(
            f"{name}: expected {len(tokens)} tokens, each once and with a token_type; got {len(set(tokens))} different "
            f"ones and {len(types)} types"
        )
    tokenizer = _gguf_tokenizer(tokens, types, _require_list(fields, name, "merges", str), pre, name)
    ids = {key: fields.get(f"tokenizer.ggml.{gguf_name}_token_id") for key, gguf_name in GGUF_NAMES.items()}
    names = {key: tokens[i] for key, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    if "eos_token" not in names:
        raise InputError(
            f"{name}: tokenizer.ggml.eos_token_id, the token that ends a document: expected one of the "
            f"{len(tokens)} tokens, got {ids['eos_token']}"
        )
    eos = tokens.index(names["eos_token"])
    if eos >= vocab_size:
        raise InputError(
            f"the vocabulary does not fit the model: the tokenizer of {name} ends a document by token {eos}, the model "
            f"has {vocab_size} rows; the file is corrupt; download it again"
        )
    add_bos, add_eos = (fields.get(f"tokenizer.ggml.add_{key}_token") is True for key in ("bos", "eos"))
    merges.add_bos_eos(tokenizer, names, add_bos, add_eos, name)
    end_ids = [fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom")]
    extra_eos_ids = [x for x in end_ids if type(x) is int and 0 <= x < min(len(tokens), vocab_size)]
    template = fields.get("tokenizer.chat_template")
    chat_template = ChatTemplate(template, names) if isinstance(template, str) else None
    return _hf_tokenizer(name, tokenizer, vocab_size, eos, extra_eos_ids, names, chat_template)


def _require_list(
    fields: Mapping[str, Any], name: str, key: str, item_type: type, default: list[Any] | None = None
) -> list[Any]:
    items = fields.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(items, list) or not all(isinstance(x, item_type) for x in items):
        actual = type(items).__name__
        raise InputError(f"{name}: tokenizer.ggml.{key}: expected a list of {item_type.__name__}, got {actual}")
    return items


def _gguf_tokenizer(tokens: list[str], types: list[int], merge_lines: list[str], pre: str, name: str) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers

    tokenizer: Any = Tokenizer(_bpe_model(tokens, merge_lines, pre in WHOLE_TOKENS, name))
    if pre in NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER)]
    tokenizer.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False) for token, kind in added])
    return tokenizer


def _bpe_model(tokens: list[str], merge_lines: list[str], whole_tokens: bool, name: str) -> Any:
    """BPE with the given merges, each two tokens with a space between. Bytes without a token, such as some control
    characters in SmolLM2's vocabulary, are dropped from a text, as by transformers and llama.cpp.
    """
    from tokenizers import models

    pairs: list[tuple[str, str]] = []
    for merge in merge_lines:
        left, _, right = merge.partition(" ")
        if not right or " " in right:
            raise InputError(f"{name}: tokenizer.ggml.merges: expected pairs of tokens, got {merge!r}")
        pairs.append((left, right))
    vocab = {token: i for i, token in enumerate(tokens)}
    error = f"{name}: tokenizer.ggml.merges: expected pairs of tokens that make tokens"
    return call(error, lambda: models.BPE(vocab=vocab, merges=pairs, ignore_merges=whole_tokens))


NORMAL, CONTROL, USER = 1, 3, 4
"""GGUF's types of tokens; tokens of other types never occur in a text."""
GGUF_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""The names of special tokens in GGUF keys."""
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
"""How the tokenizers that llama.cpp names split text, from their models' tokenizer.json; None for GPT-2's split."""
DIGITS = {"smollm"}
"""Tokenizers that first separate digits."""
WHOLE_TOKENS = {"llama-bpe", "llama3", "llama-v3"}
"""Tokenizers for which a piece of text that is a token needs no merges."""
NFC = {"qwen2", "deepseek-r1-qwen"}
"""Tokenizers that normalize text."""


def pre_tokenizer_of(pre: str) -> Any:
    """How a tokenizer that llama.cpp names splits text, as tokenizer.json has it."""
    from tokenizers import Tokenizer, models

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    return json.loads(tokenizer.to_str())["pre_tokenizer"]


def _pre_tokenizer(pre: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    split = SPLITS[pre]
    if split is None:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level]) if pre in DIGITS else byte_level
    splitter = pre_tokenizers.Split(Regex(split), behavior="isolated")
    return pre_tokenizers.Sequence([splitter, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _hf_tokenizer(
    name: str,
    tokenizer: "tokenizers.Tokenizer",
    vocab_size: int,
    eos: int,
    eos_token_ids: Sequence[int],
    names: Mapping[str, str],
    template: ChatTemplate | None,
) -> HFTokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    n_vocab = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    extra_eos_ids = tuple(dict.fromkeys(x for x in eos_token_ids if x != eos))
    return HFTokenizer(name, tokenizer, n_vocab, vocab_size, eos, extra_eos_ids, names, template)


def _replace_surrogates(text: str) -> str:
    """`text` with unpaired surrogates replaced, which the library does not accept; tiktoken does the same."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
