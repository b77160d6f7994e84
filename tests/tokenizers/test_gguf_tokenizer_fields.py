"""A tokenizer as the metadata of a GGUF file: equal to an independent writer's, and tokenizing as before."""

import json
from pathlib import Path
from typing import Any

import pytest
from builders.tokenizer_kinds import TABLE_ROWS
from builders.tokenizers import SPECIAL, STRINGS, TALK, gguf_metadata_of, ordinary_text, train_tokenizer
from hypothesis import given, settings
from tokenizers import Tokenizer as Library
from tokenizers import models

import fgpt
from fgpt.tokenizers.gguf_tokenizer import to_gguf
from fgpt.tokenizers.tokenizer_files import Tokenizer, of_folder, of_gguf

PRE = ["gpt-2", "smollm", "llama-bpe", "qwen2"]


def round_trip(tokenizer: Tokenizer, rows: int) -> Tokenizer:
    return of_gguf(to_gguf(tokenizer, rows), rows)


@pytest.mark.parametrize("pre", PRE)
def test_the_metadata_are_those_of_another_writer(pre: str):
    expected = gguf_metadata_of(train_tokenizer(pre), pre, add_bos_token=True)
    del expected["general.architecture"]
    tokenizer = of_gguf(expected, 600)
    found = to_gguf(tokenizer, len(expected["tokenizer.ggml.tokens"]))
    assert {key: found[key] for key in expected} == expected
    assert found.keys() - expected.keys() == {"tokenizer.ggml.add_eos_token"}


TRAINED: dict[str, tuple[Tokenizer, Tokenizer]] = {}


@pytest.mark.parametrize("pre", [*PRE, "nano"])
@settings(max_examples=50)
@given(text=ordinary_text)
def test_a_text_has_the_same_tokens(pre: str, text: str):
    if pre not in TRAINED:
        rows = 4096 if pre == "nano" else 600
        fresh = fgpt.tokenizer("nano") if pre == "nano" else of_gguf(gguf_metadata_of(train_tokenizer(pre), pre), 600)
        TRAINED[pre] = fresh, round_trip(fresh, rows)
    before, after = TRAINED[pre]
    assert after.encode(text) == before.encode(text)
    assert after.encode_special(text) == before.encode_special(text)
    assert after.decode(before.encode(text)) == before.decode(before.encode(text))


def test_a_folder_with_added_tokens(folder: Path):
    before = of_folder(folder, TABLE_ROWS)
    fields = to_gguf(before, TABLE_ROWS)
    types = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    assert types["<tool>"] == 4
    assert {types[token] for token in SPECIAL} == {3}
    assert types[f"[PAD{TABLE_ROWS - 1}]"] == 5
    after = of_gguf(fields, TABLE_ROWS)
    for text in [*STRINGS, "a <tool> b"]:
        assert after.encode_special(text) == before.encode_special(text)
    assert after.prefix_tokens == before.prefix_tokens != ()
    assert after.eos_token_ids == before.eos_token_ids
    assert after.apply_chat_template(TALK) == before.apply_chat_template(TALK)


def test_new_tokens():
    tokenizer = fgpt.tokenizer("nano").with_tokens(["<|user|>"], in_text=True)
    after = round_trip(tokenizer, 4097)
    assert after.encode_special("<|user|> hi") == tokenizer.encode_special("<|user|> hi")


def edited(tokenizer: Library, folder: Path, **changes: Any) -> Tokenizer:
    """The tokenizer with other parts of its tokenizer.json."""
    content = json.loads(tokenizer.to_str())
    content["post_processor"] = None
    for name, value in changes.items():
        content[name] = value(content[name])
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 600, "eos_token_id": 0}')
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return of_folder(folder, 600)


def with_prefix_space(pre_tokenizer: Any) -> Any:
    return pre_tokenizer | {"add_prefix_space": True}


def without_last_merges(model: Any) -> Any:
    """Tokens that no merges make, which are taken whole."""
    return model | {"merges": model["merges"][:-3], "ignore_merges": True}


def test_what_a_gguf_file_cannot_say(tmp_path: Path):
    trained = train_tokenizer()
    with pytest.raises(fgpt.InputError, match="its way of splitting text has no name there"):
        to_gguf(edited(trained, tmp_path, pre_tokenizer=with_prefix_space), 600)
    with pytest.raises(fgpt.InputError, match=r"cannot be merged \(3 in all\)"):
        to_gguf(edited(trained, tmp_path, model=without_last_merges), 600)
    with pytest.raises(fgpt.InputError, match="has 500 tokens, the model 400 rows"):
        to_gguf(edited(trained, tmp_path), 400)
    words = Library(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(fgpt.InputError, match="of this tokenizer it is none"):
        to_gguf(edited(words, tmp_path), 600)


@pytest.mark.parametrize("pre", [*PRE, "nano"])
def test_llama_cpp_has_the_same_tokens(pre: str, tmp_path: Path):
    llama_cpp = pytest.importorskip("llama_cpp")
    rows = 4096 if pre == "nano" else 600
    ours = fgpt.tokenizer("nano") if pre == "nano" else of_gguf(gguf_metadata_of(train_tokenizer(pre), pre), 600)
    cfg = fgpt.Config(n_layer=1, n_head=1, d_model=8, n_ctx=16, vocab_size=rows, d_mlp=8)
    fgpt.save_gguf(fgpt.init(cfg, fgpt.key(0)), tmp_path / "a.gguf", like=ours)
    theirs = llama_cpp.Llama(str(tmp_path / "a.gguf"), vocab_only=True, verbose=False)
    for text in STRINGS:
        if text and (pre != "qwen2" or "combining" not in text):  # llama.cpp does not normalize
            assert theirs.tokenize(text.encode(), add_bos=False, special=True) == ours.encode_special(text), text
    theirs.close()
