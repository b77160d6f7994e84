"""What ends a text and what ends a turn."""

import json
from pathlib import Path
from typing import Any

import pytest
from builders.tokenizer_kinds import TABLE_ROWS, fast_tokenizer, write_tokenizer_folder
from builders.tokenizers import CHATML, gguf_metadata_of, train_tokenizer
from transformers import AutoTokenizer

import fgpt
from fgpt import families
from fgpt.data.packing import filter_by_length
from fgpt.data.prompt_templates import ALPACA, CHAT, InstructionRow, encode, encode_prompt
from fgpt.errors import InputError
from fgpt.generation.beam import beam_search
from fgpt.generation.prompt_lookup import prompt_lookup_decode
from fgpt.model import init
from fgpt.tokenizers.tokenizer_files import of_folder, of_gguf

ENDS = [
    ({"eos_token_id": 3}, {}, (2, 3)),
    ({"eos_token_id": [3, 1]}, {}, (2, 3, 1)),
    ({}, {"eos_token_id": [3, 2]}, (2, 3)),
    ({"eos_token_id": [0]}, {"eos_token_id": [3]}, (2, 0)),  # generation_config.json comes before config.json
    ({"eos_token_id": [99999, -4, "x", None, True, 3]}, {}, (2, 3)),
    ({}, {}, (2,)),
]


@pytest.mark.parametrize(("generation", "config", "expected"), ENDS)
def test_every_end_that_the_configs_name(
    generation: dict[str, Any], config: dict[str, Any], expected: tuple[int, ...], tmp_path: Path
):
    at = fast_tokenizer(tmp_path, train_tokenizer(), eos_token="<|im_end|>")
    write_tokenizer_folder(at, generation_config_DOT_json=generation, config_DOT_json={"model_type": "llama"} | config)
    assert of_folder(at, TABLE_ROWS).eos_token_ids == expected
    assert of_folder(at, TABLE_ROWS).eos_token_id == 2


def test_further_ends_of_a_gguf_file():
    ours = of_gguf(gguf_metadata_of(train_tokenizer("smollm"), "smollm", eot_token_id=7, eom_token_id=9), TABLE_ROWS)
    assert ours.eos_token_ids == (2, 7, 9)
    assert json.loads(ours.files()["generation_config.json"]) == {"eos_token_id": [2, 7, 9]}


def test_any_of_several_ends_a_text():
    cfg = families.family_from_config(LLAMA).config_from_hf(LLAMA)
    params = init(cfg, fgpt.key(3))
    free = fgpt.generate(params, [[1, 2], [3], [4, 5, 6]], eos_token_id=-1, max_new_tokens=12)
    ends = {free[0].tokens[4], free[1].tokens[7]}
    assert -1 not in ends
    for got, whole in zip(
        fgpt.generate(params, [[1, 2], [3], [4, 5, 6]], eos_token_id=ends, max_new_tokens=12), free, strict=True
    ):
        first = next((i for i, token in enumerate(whole.tokens) if token in ends), None)
        assert got.tokens == whole.tokens[:first]
        assert got.finished == (first is not None)
    for prompt in ([1, 2], [3]):
        [expected] = fgpt.generate(params, [prompt], eos_token_id=ends, max_new_tokens=12)
        assert expected.finished
        assert prompt_lookup_decode(params, prompt, eos_token_id=tuple(ends), max_new_tokens=12) == expected
        [alone] = beam_search(params, prompt, eos_token_id=ends, max_new_tokens=12, num_beams=1)
        assert (alone.tokens, alone.finished) == (expected.tokens, True)
        assert fgpt.generate(params, [prompt], eos_token_id=[], max_new_tokens=12) == fgpt.generate(
            params, [prompt], eos_token_id=-1, max_new_tokens=12
        )
    with pytest.raises(InputError, match="eos_token_id is 64: expected 0 to 63"):
        fgpt.generate(params, [[1]], eos_token_id=[2, 64], max_new_tokens=1)
    with pytest.raises(InputError, match="eos_token_id is 64"):
        beam_search(params, [1], eos_token_id=[2, 64], max_new_tokens=1)


LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def test_what_ends_a_turn(tmp_path: Path):
    """A model tuned on ChatML whose end of text is another token: answers close as the template closes them."""
    tokenizer = train_tokenizer()
    at = fast_tokenizer(tmp_path, tokenizer, template=CHATML, eos_token="<|endoftext|>")
    ours = of_folder(at, TABLE_ROWS)
    assert (ours.eos_token_id, ours.end_of_turn, ours.eos_token_ids) == (0, (2,), (0, 2))
    row = InstructionRow("Say it.", output="Hello")
    talk = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "Hello"}]
    whole = encode(row, CHAT, ours)
    expected = AutoTokenizer.from_pretrained(at).apply_chat_template(talk, return_dict=False)
    assert [*whole.tokens, *ours.encode("\n")] == expected
    assert whole.tokens[: whole.prompt_length] == encode_prompt(row, CHAT, ours)
    assert encode(row, ALPACA, ours).tokens[-1] == 0


def test_a_turn_that_ends_by_more_than_one_token(folders: dict[str, Path]):
    """Llama 2 writes a space and then </s>."""
    ours = of_folder(folders["Metaspace, <s> around, a chat template"], TABLE_ROWS)
    blank = ours.encode_special("x </s>", add_special_tokens=False)[1]
    assert ours.end_of_turn == (blank, 2)
    row = InstructionRow("Say it.", output="Hello")
    talk = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "Hello"}]
    assert list(encode(row, CHAT, ours).tokens) == ours.apply_chat_template(talk, add_generation_prompt=False)
    _, dropped = filter_by_length(
        [encode(row, CHAT, ours), encode(InstructionRow("Say it."), CHAT, ours)], 100, drop=True
    )
    assert dropped.empty == 1


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0].content }}", "{{ messages[1].content }}\n", "{{ raise_exception('no') }}", "{% for %}", "ANSWER"],
)
def test_a_template_that_ends_no_turn(template: str, tmp_path: Path):
    ours = of_folder(fast_tokenizer(tmp_path, train_tokenizer(), template=template, eos_token="<|im_end|>"), TABLE_ROWS)
    assert (ours.end_of_turn, ours.eos_token_ids) == ((2,), (2,))
