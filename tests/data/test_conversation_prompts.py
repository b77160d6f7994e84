"""The prompt of a conversation: templates, tools, turns of a chat."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from builders.conversations import ASSISTANT, SYSTEM, TALK, USER, messages_row
from hypothesis import given
from hypothesis import strategies as st

import fgpt
from fgpt.cli.inference.generation import LoadedRun, encode_conversation
from fgpt.data.conversations import (
    Message,
)
from fgpt.data.packing import collate
from fgpt.data.prompt_templates import ALPACA, CHAT, PLAIN, TEMPLATES, TULU, InstructionRow, Turn, encode
from fgpt.errors import InputError
from fgpt.recipes import InstructionRecipe, find
from fgpt.tokenizers.chat_template import ChatTemplate
from fgpt.tokenizers.tiktoken_bpe import RANKS, from_ranks

NANO = from_ranks(Path(fgpt.__file__).parent / "nano" / RANKS)


FRENCH = Turn("", "", "Bonne nuit.", messages_row(SYSTEM, *TALK[:3]))
BELOW = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"


def test_what_a_conversation_looks_like():
    end = "<|endoftext|>"
    expected = {
        "alpaca": f"Answer in French.\n\n{BELOW}### Instruction:\nHello.\n\n### Response:\nBonjour.{end}"
        f"{BELOW}### Instruction:\nGood night.\n\n### Response:\n",
        "plain": f"Answer in French.\n\nInstruction: Hello.\n\nResponse:\nBonjour.{end}"
        "Instruction: Good night.\n\nResponse:\n",
        "tulu": f"<|system|>\nAnswer in French.\n<|user|>\nHello.\n<|assistant|>\nBonjour.{end}"
        "<|user|>\nGood night.\n<|assistant|>\n",
    }
    for name, text in expected.items():
        example = encode(FRENCH, TEMPLATES[name], NANO)
        assert NANO.decode(list(example.tokens)) == f"{text}Bonne nuit.{end}", name
        assert NANO.decode(list(example.tokens[: example.prompt_length])) == text
        assert example.tokens[: example.prompt_length].count(NANO.eos_token_id) == 1


def test_a_tool_and_an_assistant_that_goes_on():
    talk = [USER, ASSISTANT, {"role": "tool", "content": "4"}, ASSISTANT]
    turns = PLAIN.turns(messages_row(*talk))
    assert turns == [
        ("Instruction: No?\n\nResponse:\n", "Yes."),
        ("Tool: 4\n\nResponse:\n", "Yes."),
        ("Response:\n", None),
    ]
    assert TULU.turns(messages_row(*talk[:3]))[1] == ("<|tool|>\n4\n<|assistant|>\n", None)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4), st.sampled_from([ALPACA, PLAIN, TULU]))
def test_a_turn_s_prompt_is_the_example_before_it_and_the_next_question(talk: list[tuple[str, str]], look: Any):
    """So a model is asked in the words that it was trained on, token by token; and one turn is a plain row."""
    messages: list[Message] = []
    before: tuple[int, ...] = ()
    for question, answer in talk:
        messages.append(Message("user", question))
        example = encode(Turn("", "", answer, tuple(messages)), look, NANO)
        alone = encode(InstructionRow(question, "", answer), look, NANO)
        assert example.tokens == (*before, *alone.tokens)
        assert example.prompt_length == len(before) + alone.prompt_length
        messages.append(Message("assistant", answer))
        before = example.tokens
    batch = collate([[encode(Turn("", "", talk[-1][1], tuple(messages[:-1])), look, NANO)]])
    assert batch.weights.sum() == len(NANO.encode(talk[-1][1])) + 1  # the last answer and its end alone


CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|go|>{% endif %}"
)


def test_a_chat_template_gets_every_message():
    tokenizer = NANO.with_chat_template(ChatTemplate(CHATML, {}))
    example = encode(FRENCH, CHAT, tokenizer)
    text = "<|system|>Answer in French.\n<|user|>Hello.\n<|assistant|>Bonjour.\n<|user|>Good night.\n<|go|>"
    assert tokenizer.decode(list(example.tokens[: example.prompt_length])) == text
    assert tokenizer.decode(list(example.tokens[example.prompt_length :])) == "Bonne nuit.<|endoftext|>"


def test_a_chat_template_that_refuses_names_the_row():
    strict = NANO.with_chat_template(ChatTemplate("{{ raise_exception('roles must alternate') }}", {}))
    row = Turn("", "", "x", messages_row(*TALK[:1]), conversation="a.jsonl, line 3")
    with pytest.raises(InputError, match=r"^a\.jsonl, line 3: the model's chat template fails .*roles must alternate"):
        encode(row, CHAT, strict)


@pytest.mark.parametrize("name", ["alpaca", "plain", "tulu"])
def test_a_chat_asks_in_the_words_of_training(name: str):
    run = cast(InstructionRecipe, find("lora-nano"))
    loaded = LoadedRun(replace(run, template=name), cast(Any, None), NANO)
    messages = [InstructionRow("Hello.", "", "Bonjour."), InstructionRow("Good night.")]
    trained = encode(Turn("", "", "Bonne nuit.", messages_row(*TALK[:3])), TEMPLATES[name], NANO)
    assert encode_conversation(loaded, messages) == list(trained.tokens[: trained.prompt_length])
