"""Spoiled tokenizers and vocabularies; the panics of a native library."""

import base64
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from builders.hostile_files import LOADED, TRIED, assert_enough, outcome_of, time_limit
from builders.mutations import DEEP, bit_flips, each_in_turn, mutations, places_of, truncations
from builders.tokenizers import train_tokenizer

import fgpt
from fgpt import library_errors
from fgpt.errors import InputError
from fgpt.tokenizers import huggingface
from fgpt.tokenizers.child_process import Child
from fgpt.tokenizers.tokenizer_files import Tokenizer, of_folder

# ----------------------------------------------------------------------------------------------------------- tokenizers


def check_tokenizer(tokenizer: Tokenizer, vocab: int) -> None:
    """Asserts that what is there can be used."""
    assert tokenizer.n_vocab > 0
    assert 0 <= tokenizer.eos_token_id < vocab
    assert all(0 <= token < vocab for token in tokenizer.eos_token_ids)
    with time_limit():
        try:
            tokens = tokenizer.encode("Once upon a time, 12 é\n")
        except InputError:
            return
    assert all(0 <= token < min(tokenizer.n_vocab, vocab) for token in tokens)
    assert isinstance(tokenizer.decode(tokens), str)


def charsmap(data: bytes) -> dict[str, Any]:
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}}


def twice(rule: dict[str, Any], times: int) -> dict[str, Any]:
    return {"normalizer": {"type": "Sequence", "normalizers": [rule] * times}}


PANICS: dict[str, dict[str, Any]] = {
    "an allocation of gigabytes": charsmap(b"\xff" * 4),
    "a charsmap of nothing": charsmap(b""),
    "a charsmap that is cut": charsmap(b"\x03\0\0\0abc"),
    "a charsmap that points outside": charsmap(b"\x08\0\0\0" + b"\x00\x04\xff\xff" * 2 + b"abc\0"),
    "a text that doubles again and again": twice({"type": "ByteLevel"}, 60),
    "a letter that doubles": twice({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}, 60),
    "nothing is replaced": twice({"type": "Replace", "pattern": {"String": ""}, "content": "x"}, 1),
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a second text that is none": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "B", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
    "a token that the template has not": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
    "a prefix longer than its tokens": {"model": {"continuing_subword_prefix": "####"}},
    "a prefix that cuts a character": {
        "model": {
            "vocab": {"a": 0, "ab": 1, "é": 2, "aé": 3},
            "merges": [["a", "é"]],
            "continuing_subword_prefix": "x",
        }
    },
    "a decoder that strips more than is there": {"decoder": {"type": "Strip", "content": "é", "start": 3, "stop": 3}},
    "brackets without end": {
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "(" * 20000 + "a" + ")" * 20000},
            "behavior": "Isolated",
            "invert": False,
        }
    },
}


@pytest.mark.parametrize("name", PANICS)
def test_tokenizer_files_that_panic_or_abort(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface, "_checker", Child("validation_worker.py", 2))
    whole = json.loads(train_tokenizer().to_str())
    model = whole["model"] | PANICS[name].get("model", {})
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole | PANICS[name] | {"model": model}))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert outcome_of("panics", tmp_path, lambda: of_folder(tmp_path, 2000)) is None
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    check_tokenizer(of_folder(tmp_path, 2000), 2000)  # and the next is read


def test_a_panic_while_reading_a_text(tmp_path: Path):
    """Where a file is well, a text may still be too much for the library."""

    class PanicException(BaseException): ...

    def panic() -> None:
        raise PanicException("index out of\nbounds")

    with pytest.raises(InputError, match=r"^t: index out of bounds$"):
        library_errors.call("t", panic)
    with pytest.raises(KeyboardInterrupt):
        library_errors.call("t", lambda: (_ for _ in ()).throw(KeyboardInterrupt()))


def test_spoiled_merges_and_special_tokens(tmp_path: Path):
    tokenizer = train_tokenizer()
    tokenizer.model.save(str(tmp_path))
    files = {
        "merges.txt": (tmp_path / "merges.txt").read_text(encoding="utf-8"),
        "added_tokens.json": '{"<tool>": 500, "<x>": 501}',
        "special_tokens_map.json": '{"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>"}',
        "config.json": '{"model_type": "gpt2"}',
        "tokenizer_config.json": '{"add_bos_token": true, "extra_special_tokens": ["<x>"]}',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    check_tokenizer(of_folder(tmp_path, 600), 600)
    odd = ['{"added_tokens_decoder": 1}', '{"added_tokens_decoder": {"x": {}}}', '{"added_tokens_decoder": {"1": "a"}}']
    odd += ['{"<tool>": -1}', '{"<tool>": "1"}', "[]", "{", "a b c\n", "zzzz y\n", "a\n", '{"eos_token": 3}']
    odd += ['{"add_bos_token": true, "bos_token": "a:b c", "eos_token": "<|im_end|>"}', '{"eos_token": {"lstrip": 3}}']
    for name, text in files.items():
        for corrupt in [*odd, *truncations(text.encode(), 6), *bit_flips(text.encode(), 6)]:
            (tmp_path / name).write_bytes(corrupt if isinstance(corrupt, bytes) else corrupt.encode())
            if found := outcome_of("merges", tmp_path, lambda: of_folder(tmp_path, 600)):
                check_tokenizer(found, 600)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert 0 < LOADED["merges"] < TRIED["merges"]


def test_spoiled_tokenizer_json(tmp_path: Path):
    vocab = 2000
    tokenizer = json.loads(train_tokenizer().to_str())
    configs = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {
            "eos_token": "<|im_end|>",
            "bos_token": {"content": "<|im_start|>", "special": True},
            "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
        },
        "generation_config.json": {"eos_token_id": [2, 1]},
        "config.json": {"model_type": "llama", "eos_token_id": 1},
    }
    for name, value in configs.items():
        (tmp_path / name).write_text(json.dumps(value))
    check_tokenizer(of_folder(tmp_path, vocab), vocab)

    for name, value in configs.items():
        path = tmp_path / name

        def check(data: str | bytes, path: Path = path) -> None:
            path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
            if found := outcome_of("tokenizers", tmp_path, lambda: of_folder(tmp_path, vocab)):
                check_tokenizer(found, vocab)

        for text in DEEP:
            check(text)
        whole = json.dumps(value).encode()
        parts = [p for p in places_of(value) if "vocab" not in p[:2] and "merges" not in p[:2]]
        if name == "tokenizer.json":
            parts += [("model", "vocab"), ("model", "merges"), ("model", "merges", 0), ("model", "merges", 0, 0)]
            parts += [("model", "vocab", token) for token in list(value["model"]["vocab"])[:3]] * 3
            for corrupt in (*truncations(whole, 10), *bit_flips(whole, 15)):
                check(corrupt)
        each_in_turn(45 if name == "tokenizer.json" else 20, mutations(value, tuple(parts)), check)
        path.write_bytes(whole)
    assert_enough("tokenizers", 3)


@pytest.mark.parametrize("name", ["vocab.json", "ranks.tiktoken"])
def test_spoiled_vocabularies(name: str, tmp_path: Path):
    nano = fgpt.tokenizer("nano")
    ranks = nano.files()["ranks.tiktoken"]  # pyright: ignore[reportAttributeAccessIssue]
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    path, vocab = tmp_path / name, nano.n_vocab + 5
    first = ranks.splitlines()[0].split()[0]
    if name == "vocab.json":
        from base64 import b64decode

        from fgpt.tokenizers.tiktoken_bpe import BYTE_OF_CHAR

        char = {byte: c for c, byte in BYTE_OF_CHAR.items()}
        value = {"".join(char[b] for b in b64decode(line.split()[0])): i for i, line in enumerate(ranks.splitlines())}
        whole = json.dumps(value)
    else:
        value, whole = None, ranks

    def check(data: bytes) -> None:
        path.write_bytes(data)
        if found := outcome_of("tokenizers", tmp_path, lambda: of_folder(tmp_path, vocab)):
            check_tokenizer(found, vocab)
            if name == "vocab.json":
                output = {k: v for k, v in json.loads(data).items() if k != "<|endoftext|>"}
                assert found.n_vocab == len(output) + 1
                assert all(type(rank) is int for rank in output.values())

    check(whole.encode())
    for corrupt in (*truncations(whole.encode(), 12), *bit_flips(whole.encode(), 20)):
        check(corrupt)
    if value is not None:
        for text in DEEP:
            check(text.encode("utf-8", "surrogatepass"))
        few = tuple((token,) for token in list(value)[:5])
        each_in_turn(15, mutations(value, ((), *few)), lambda text: check(text.encode("utf-8", "surrogatepass")))
        for odd in (1.0, True, "1", None, [], -1, 10**400):
            check(json.dumps(value | {list(value)[1]: odd}).encode())
    else:
        for line in (
            "= 1",
            f"{first} -1",
            f"{first} 1e9",
            f"{first} {10**400}",
            f"{first} {'9' * 5000}",
            f"{first}",
            "a",
        ):
            check(f"{whole}{line}\n".encode())
    assert_enough("tokenizers", 3)


@pytest.mark.parametrize(
    "data", [b"\xff\xfe", b"{{ ''.__class__ }}", b"{% for", "{{ '\ud800' }}".encode("utf-8", "surrogatepass"), b"\0"]
)
def test_a_template_in_a_file_of_its_own(data: bytes, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text(train_tokenizer().to_str())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "chat_template.jinja").write_bytes(data)
    if found := outcome_of("tokenizers", tmp_path, lambda: of_folder(tmp_path, 2000)):
        with suppress(InputError):
            assert isinstance(found.apply_chat_template([{"role": "user", "content": "Hi"}]), list)


# ------------------------------------------------------------------------------------------------ what has been mended


@pytest.mark.parametrize("rank", [1.0, True, "1", None])
def test_ranks_of_a_vocabulary_are_whole_numbers(rank: Any, tmp_path: Path):
    from fgpt.tokenizers.tiktoken_bpe import BYTE_OF_CHAR, from_vocab

    vocab = {char: i for i, char in enumerate(BYTE_OF_CHAR)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {list(vocab)[1]: rank}))
    with pytest.raises(InputError, match="expected every rank from 0 once"):
        from_vocab(tmp_path / "vocab.json")
