"""A program that tries out tokenizer.json files, a request {"path": ..} each; see `fgpt.tokenizers.child_process`.

The library that reads them is written in Rust. A malformed file may make it panic, which is not an `Exception` in
Python, or end the whole process: by an allocation whose size the file gives, or by a normalizer that doubles a text
repeatedly. So a file is first read in this process, which has limits of time and memory, and used on a few texts.
"""

import json
from typing import Any

MEMORY = 4 << 30
"""Bytes that the process may map: the largest tokenizers on the hub take a fifth of it."""
TEXTS = (
    "",
    " ",
    "Once upon a time, 12 é\n",
    "".join(map(chr, range(32, 127))),
    "  two  spaces\n\n\ttabs\r\n it's\u00a0nbsp \u200b e\u0301 日本語 👋🏽 \x00\x7f",
    "a" * 40 + " " * 40 + "1" * 40,
    "a",
)
"""Texts to encode: each kind of character, alone and in runs."""
MAX_TOKENS = 100_000
"""Tokens of all these texts together: a file whose normalizers produce more produces too many of any text."""
TOKENS_PER_CHARACTER = 10
"""Tokens allowed in addition for each character."""
MAX_PATTERNS = 100
"""Patterns of a file's rules, and added tokens, that are tried out."""
MAX_DECODED = 300
"""Tokens at each end of the vocabulary that are decoded."""


def patterns(rules: Any) -> list[str]:
    """The strings that a file's rules search for, at any depth: a text with one of them makes its rule apply."""
    strings: list[str] = []
    stack = [rules]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack += value.values()
            strings += [x for key in ("String", "content") if isinstance(x := value.get(key), str) and x]
        elif isinstance(value, list):
            stack += value
    return strings


def check(path: str) -> None:
    """Read a file and use it, so that whatever the library does happens here."""
    from tokenizers import Tokenizer

    with open(path, encoding="utf-8-sig") as file:
        text = file.read()
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    content = json.loads(text)
    rules = {key: content.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}
    added = [token["content"] for token in content.get("added_tokens") or []]
    strings = patterns(rules)[:MAX_PATTERNS] + added[:MAX_PATTERNS]
    texts = [*TEXTS, *(f"a{x[:1000]} {x[:1000]}b" for x in strings)]
    tokens_left = MAX_TOKENS + TOKENS_PER_CHARACTER * sum(map(len, texts))
    for encode_special_tokens in (True, False):
        tokenizer.encode_special_tokens = encode_special_tokens
        for text in texts:
            tokens_left -= count_tokens(tokenizer, text)
            if tokens_left < 0:
                raise ValueError("produces many thousands of tokens of a short text")
    size = tokenizer.get_vocab_size()
    tokenizer.decode(list(range(min(size, MAX_DECODED))))
    tokenizer.decode(list(range(max(0, size - MAX_DECODED), size)))
    tokenizer.to_str()


def count_tokens(tokenizer: Any, text: str) -> int:
    """The number of tokens of a text; 0 if the library raises an ordinary exception for it."""
    try:
        tokens = tokenizer.encode(text, add_special_tokens=False).ids
        tokenizer.decode(tokens[:1000])
        tokenizer.encode(text, add_special_tokens=True)
    except (
        Exception
    ):  # such as for an unknown word without an unknown token: whoever encodes such a text gets the error
        return 0
    return len(tokens)


def answer(request: dict[str, str]) -> dict[str, str]:
    """{} for a valid file, or {"error": ..}."""
    try:
        check(request["path"])
    except BaseException as err:  # a panic of the library is not an Exception
        return {"error": str(err)[:300] or type(err).__name__}
    return {}
