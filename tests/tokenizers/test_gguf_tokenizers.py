"""The tokenizer of a GGUF file is transformers'."""

from pathlib import Path
from typing import Any

import gguf
import pytest
from builders.tokenizers import STRINGS, TALK, assert_same_tokens, gguf_metadata_of, ordinary_text, train_tokenizer
from hypothesis import given, settings
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer

from fgpt.io.gguf_header import read_header
from fgpt.tokenizers.huggingface import HFTokenizer
from fgpt.tokenizers.tokenizer_files import of_folder, of_gguf


def write_metadata(path: Path, values: dict[str, Any]) -> Path:
    writer = gguf.GGUFWriter(str(path), values["general.architecture"])
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif key != "general.architecture":
            (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_a_gguf_file_is_transformers(pre: str, tmp_path: Path):
    architecture = {"gpt-2": "gpt2", "llama-bpe": "llama", "qwen2": "qwen2"}[pre]
    trained = train_tokenizer(pre)
    values = gguf_metadata_of(trained, pre) | {"general.architecture": architecture}
    path = write_metadata(tmp_path / "t.gguf", values)
    ours = of_gguf(read_header(path).fields, 600)
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    for text in STRINGS:
        if pre != "qwen2" or "combining" not in text:  # transformers drops Qwen's NFC there
            assert_same_tokens(ours, reference, text)
        assert (
            ours.encode(text) == trained.encode(text.replace("<|", "< |"), add_special_tokens=False).ids or "<|" in text
        )
    assert ours.eos_token_id == reference.eos_token_id
    assert ours.apply_chat_template(TALK) == reference.apply_chat_template(
        TALK, add_generation_prompt=True, return_dict=False
    )


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
@settings(max_examples=100)
@given(text=ordinary_text)
def test_a_gguf_file_cuts_text_as_its_model_does(pre: str, text: str):
    trained, ours = PRE.setdefault(pre, (lambda t: (t, of_gguf(gguf_metadata_of(t, pre), 600)))(train_tokenizer(pre)))
    trained.encode_special_tokens = True
    assert ours.encode(text) == trained.encode(text, add_special_tokens=False).ids


PRE: dict[str, tuple[Library, HFTokenizer]] = {}


def test_what_a_gguf_tokenizer_writes_is_read_again(tmp_path: Path):
    ours = of_gguf(gguf_metadata_of(train_tokenizer("smollm"), "smollm"), 600)
    for name, text in ours.files().items():
        (tmp_path / name).write_text(text)
    reloaded, reference = of_folder(tmp_path, 600), AutoTokenizer.from_pretrained(tmp_path)
    for text in STRINGS:
        assert_same_tokens(reloaded, reference, text)
        assert reloaded.encode(text) == ours.encode(text)
    assert (reloaded.eos_token_id, reloaded.n_vocab) == (ours.eos_token_id, ours.n_vocab)
    assert reloaded.apply_chat_template(TALK) == ours.apply_chat_template(TALK)
    assert ours.apply_chat_template(TALK) == reference.apply_chat_template(
        TALK, add_generation_prompt=True, return_dict=False
    )
