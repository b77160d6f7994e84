"""Every tokenizer keeps one protocol: text comes back, special tokens in it stay text."""

from dataclasses import replace
from pathlib import Path

import pytest
from builders.tokenizers import (
    CHATML,
    SPECIAL,
    STRINGS,
    TALK,
    assert_same_tokens,
    gguf_metadata_of,
    ordinary_text,
    train_tokenizer,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import fgpt
from fgpt.errors import InputError
from fgpt.tokenizers import tiktoken_bpe
from fgpt.tokenizers.chat_template import ChatTemplate
from fgpt.tokenizers.tokenizer_files import Tokenizer, of_folder, of_gguf

NANO = Path(fgpt.__file__).parent / "nano"


# ------------------------------------------------------------------------------------------------------- the protocol


@pytest.fixture(scope="module")
def several(folder: Path) -> dict[str, Tokenizer]:
    tokenizer = train_tokenizer("smollm")
    return {
        "ranks": tiktoken_bpe.from_ranks(NANO / tiktoken_bpe.RANKS).with_chat_template(ChatTemplate(CHATML, {})),
        "tokenizer.json": of_folder(folder, 600),
        "GGUF": of_gguf(gguf_metadata_of(tokenizer, "smollm"), 600),
    }


KINDS = ["ranks", "tokenizer.json", "GGUF"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(text=ordinary_text)
@example(text="<|endoftext|>")
@example(text="<|im_end|><|im_start|>")
def test_text_comes_back_and_special_tokens_in_it_stay_text(several: dict[str, Tokenizer], kind: str, text: str):
    tokenizer = several[kind]
    assert isinstance(tokenizer, Tokenizer)
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.eos_token_id not in tokens
    assert all(0 <= token < tokenizer.n_vocab for token in tokens)
    assert tokenizer.decode([*tokens, tokenizer.eos_token_id]) == text + tokenizer.decode([tokenizer.eos_token_id])


@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(st.text(max_size=30) | st.sampled_from(["<|endoftext|>", "<|im_end|>\n", "", "\ud83d x", "the"])))
@example(texts=["a", " " * 20_000 + "b", "\udc00"])
def test_a_batch_is_each_text_by_itself(several: dict[str, Tokenizer], kind: str, texts: list[str]):
    tokenizer = several[kind]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    special = [tokenizer.encode_special(text, add_special_tokens=False) for text in texts]
    assert tokenizer.encode_batch(texts, has_special=True) == special


def test_a_batch_refuses_tokens_without_a_row(folder: Path):
    tokenizer = of_folder(folder, 600)
    smaller = replace(tokenizer, vocab_size=min(tokenizer.encode("the cat")))
    with pytest.raises(InputError, match="vocabulary does not fit the model"):
        smaller.encode_batch(["", "the cat"])


@pytest.mark.parametrize("kind", KINDS)
def test_edges_of_the_protocol(several: dict[str, Tokenizer], kind: str):
    tokenizer = several[kind]
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([*tokenizer.encode("a"), 10**6, -1]) == "a"  # rows of a padded table have no text
    assert tokenizer.decode([tokenizer.eos_token_id]) in SPECIAL
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")  # half a surrogate pair


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_is_its_text_with_special_tokens(several: dict[str, Tokenizer], kind: str):
    tokenizer = several[kind]
    tokens = tokenizer.apply_chat_template(TALK)
    assert tokenizer.decode(tokens) == ChatTemplate(CHATML, {}).render(TALK)
    assert tokenizer.decode(tokens).endswith("<|im_start|>assistant\n")
    so_far = tokenizer.apply_chat_template(TALK, add_generation_prompt=False)
    assert tokens[: len(so_far)] == so_far
    if kind != "ranks":  # of which only <|endoftext|> is one
        assert so_far.count(tokenizer.eos_token_id) == len(TALK)


# -------------------------------------------------------------------------------------------------------- transformers


@settings(max_examples=200)
@given(text=ordinary_text)
def test_a_folder_is_transformers(folder: Path, text: str):
    assert_same_tokens(of_folder(folder, 600), AutoTokenizer.from_pretrained(folder), text)


def test_a_folder_is_transformers_on_all_strings(folder: Path):
    ours, reference = of_folder(folder, 600), AutoTokenizer.from_pretrained(folder)
    for text in STRINGS:
        assert_same_tokens(ours, reference, text)
    assert ours.eos_token_id == reference.eos_token_id
    assert ours.n_vocab == len(reference)
    assert ours.encode("a <tool> b") == reference.encode("a <tool> b", add_special_tokens=False)
    for answer in (True, False):
        assert ours.apply_chat_template(TALK, answer) == reference.apply_chat_template(
            TALK, add_generation_prompt=answer, return_dict=False
        )
