"""A program that tries tokenizer.json files, each asked for by {"path": ..}; see `fgpt.tokenizers.child_process`.

The library that reads them is written in Rust. A file that breaks its assumptions makes it panic, which is no
`Exception` in Python, or ends the whole process: by an allocation of as many bytes as a field of the file says, or by a
normalizer that doubles a text again and again. So a file is first read here, in a process that ends when it takes too
long and may not grow, and is used on a few texts.
"""

import json
from typing import Any

MEMORY = 4 << 30
"""Bytes that the process may map: the largest tokenizers of the hub take a fifth of it."""
TEXTS = (
    "",
    " ",
    "Once upon a time, 12 é\n",
    "".join(map(chr, range(32, 127))),
    "  two  spaces\n\n\ttabs\r\n it's\u00a0nbsp \u200b e\u0301 日本語 👋🏽 \x00\x7f",
    "a" * 40 + " " * 40 + "1" * 40,
    "a",
)
"""What a tokenizer is used on: each kind of character, alone and in runs."""
LONGEST = 100_000
"""Tokens of all those texts together: a file whose normalizers make more of them makes too much of any text."""


def patterns(value: Any) -> list[str]:
    """Strings that a file's rules look for, at any depth: each is a text in which its rule is met."""
    found: list[str] = []
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
            found += [x for key in ("String", "content") if isinstance(x := value.get(key), str) and x]
        elif isinstance(value, list):
            left += value
    return found


def check(path: str) -> None:
    """Read a file and use it; whatever the library does then, it does here."""
    from tokenizers import Tokenizer

    with open(path, encoding="utf-8-sig") as file:
        text = file.read()
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    said = json.loads(text)
    rules = {key: said.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}
    added = [x["content"] for x in said.get("added_tokens") or []][:100]
    several = [*TEXTS, *(f"a{x[:1000]} {x[:1000]}b" for x in [*patterns(rules)[:100], *added])]
    most = LONGEST + 10 * sum(map(len, several))
    for split in (True, False):
        tokenizer.encode_special_tokens = split
        for each in several:
            most -= used(tokenizer, each)
            if most < 0:
                raise ValueError("makes many thousands of tokens of a short text")
    size = tokenizer.get_vocab_size()
    tokenizer.decode(list(range(min(size, 300))))
    tokenizer.decode(list(range(max(0, size - 300), size)))
    tokenizer.to_str()


def used(tokenizer: Any, text: str) -> int:
    """How many tokens it makes of a text; none where it refuses that text in an orderly way."""
    try:
        tokens = tokenizer.encode(text, add_special_tokens=False).ids
        tokenizer.decode(tokens[:1000])
        tokenizer.encode(text, add_special_tokens=True)
    except Exception:  # such as an unknown word where no token stands for those: whoever reads the text is told
        return 0
    return len(tokens)


def answer(asked: dict[str, str]) -> dict[str, str]:
    """{} for a file that is well, or what went wrong, {"error": ..}."""
    try:
        check(asked["path"])
    except BaseException as err:  # a panic of the library is no Exception
        return {"error": str(err)[:300] or type(err).__name__}
    return {}
