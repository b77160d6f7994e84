"""Prompt templates: training and generation share the prompt; a user's text is only text."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fgpt
from fgpt.data.prompt_templates import ALPACA, PLAIN, TEMPLATES, InstructionRow, encode, encode_prompt
from fgpt.tokenizers.tiktoken_bpe import RANKS, from_ranks

TOKENIZER = from_ranks(Path(fgpt.__file__).parent / "nano" / RANKS)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
row_texts = st.builds(InstructionRow, texts, texts, texts.filter(str.strip))


def test_alpaca_is_stanfords_text():
    assert ALPACA.prompt(InstructionRow("Add.", "1 2")) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert ALPACA.prompt(InstructionRow("Add.")) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert PLAIN.prompt(InstructionRow("Add.", " \n")) == "Instruction: Add.\n\nResponse:\n"


@given(row_texts, st.sampled_from(["alpaca", "plain", "tulu"]))
def test_training_and_generation_share_the_prompt(row: InstructionRow, name: str):
    example = encode(row, TEMPLATES[name], TOKENIZER)
    assert example.tokens[: example.prompt_length] == encode_prompt(
        InstructionRow(row.instruction, row.input), TEMPLATES[name], TOKENIZER
    )
    assert TOKENIZER.decode(list(example.tokens[: example.prompt_length])) == TEMPLATES[name].prompt(row)
    assert TOKENIZER.decode(list(example.tokens[example.prompt_length : -1])) == row.output
    assert example.tokens[-1] == TOKENIZER.eos_token_id
    assert example.tokens.count(TOKENIZER.eos_token_id) == 1


@pytest.mark.parametrize("text", ["{input}", "{", "{0}", "}{instruction}", "<|endoftext|>", "a {{b}}"])
def test_users_text_is_only_text(text: str):
    example = encode(InstructionRow(text, text, text), ALPACA, TOKENIZER)
    assert TOKENIZER.decode(list(example.tokens[:-1])).count(text) == 3
    assert example.tokens.count(TOKENIZER.eos_token_id) == 1
