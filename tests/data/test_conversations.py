"""Conversations: each answer is one example of all that precedes it, and nothing is left out without a count."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyarrow
import pyarrow.parquet
import pytest
from builders import SharedData
from hypothesis import given
from hypothesis import strategies as st

import fgpt
from fgpt.cli.evaluation.compare.html import page as html_page
from fgpt.cli.evaluation.compare.markdown import to_markdown
from fgpt.cli.evaluation.compare.results import Answer, Comparison
from fgpt.cli.inference.generation import LoadedRun, encode_conversation
from fgpt.cli.training.examples import load_instruction_split, train_heldout_split
from fgpt.data.conversations import (
    EMPTY,
    EMPTY_ANSWER,
    IGNORED,
    REASONING,
    UNANSWERED,
    UNPROMPTED,
    UNWEIGHTED,
    WITHOUT_ANSWER,
    Message,
)
from fgpt.data.instruction_datasets import Columns, load_examples, load_rows
from fgpt.data.packing import collate, truncate
from fgpt.data.prompt_templates import ALPACA, CHAT, PLAIN, TEMPLATES, TULU, InstructionRow, Turn, encode, encode_prompt
from fgpt.errors import InputError
from fgpt.recipes import InstructionRecipe, find
from fgpt.tokenizers.chat_template import ChatTemplate
from fgpt.tokenizers.tiktoken_bpe import RANKS, from_ranks

NANO = from_ranks(Path(fgpt.__file__).parent / "nano" / RANKS)

SYSTEM = {"role": "system", "content": "Answer in French."}
TALK = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Bonjour."},
    {"role": "user", "content": "Good night."},
    {"role": "assistant", "content": "Bonne nuit."},
]
ALPACA_ROW = {"instruction": "Good night.", "output": "Bonne nuit."}
SHAREGPT = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}


def write(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


def messages(*talk: dict[str, Any]) -> tuple[Message, ...]:
    return tuple(Message(each["role"], each["content"]) for each in talk)


def examples_of(path: Path) -> list[tuple[tuple[Message, ...], str]]:
    """(what precedes an answer, the answer), whatever kind of row holds it."""
    found = []
    for row in load_rows(path):
        before = row.messages if isinstance(row, Turn) else (Message("user", row.instruction),)
        found.append((before, row.output))
    return found


# ------------------------------------------------------------------------------------------------------------- reading


def sharegpt(talk: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"from": SHAREGPT[each["role"]], "value": each["content"]} for each in talk]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [SYSTEM, *TALK]},
        {"messages": [{**SYSTEM, "role": "developer"}, *TALK]},
        {"messages": json.dumps([SYSTEM, *TALK])},
        {"messages": [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in [SYSTEM, *TALK]]},
        {"conversations": sharegpt([SYSTEM, *TALK])},
        {"conversations": sharegpt(TALK), "system": "Answer in French.", "tools": "[]"},
        {"conversations": [each["content"] for each in TALK], "system": "Answer in French."},
        {"prompt": [SYSTEM, TALK[0]], "completion": TALK[1:]},
        ALPACA_ROW | {"history": [["Hello.", "Bonjour."]], "system": "Answer in French."},
        ALPACA_ROW | {"history": [["Hello.", "Bonjour."]], "system_prompt": "Answer in French.", "system": ""},
        ALPACA_ROW | {"messages": [SYSTEM, *TALK]},
        {"conversations": None, "instruction": None, "output": None, "prompt": None, "messages": [SYSTEM, *TALK]},
        {"messages": [SYSTEM, *TALK], "conversations": sharegpt([SYSTEM, *TALK])},
        [SYSTEM, *TALK],
    ],
)
def test_every_format_gives_an_example_for_each_answer(record: Any, tmp_path: Path):
    assert examples_of(write(tmp_path / "a.jsonl", record)) == [
        (messages(SYSTEM, TALK[0]), "Bonjour."),
        (messages(SYSTEM, *TALK[:3]), "Bonne nuit."),
    ]


def test_a_parquet_file_of_messages(tmp_path: Path):
    """Its structs have every key, null where a message has none."""
    talk = [{"role": "user", "content": "Two?", "weight": None}, {"role": "assistant", "content": "2", "weight": 1}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": talk}]), tmp_path / "a.parquet")
    assert load_rows(tmp_path / "a.parquet") == [InstructionRow("Two?", "", "2")]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TALK[:2]},
        {"conversations": ["Hello.", "Bonjour."]},
        {"prompt": "Hello.", "completion": "Bonjour."},
        {"prompt": [TALK[0]], "completion": [TALK[1]]},
        {"instruction": "Hello.", "output": "Bonjour.", "history": []},
        {"instruction": "Hello.", "output": "Bonjour.", "history": "A column of another meaning."},
        {"instruction": "Hello.", "output": "Bonjour.", "conversation": "A column of another meaning."},
        {"instruction": "Hello.", "output": "Bonjour.", "messages": None, "conversations": [], "conversation": 5},
        {"messages": None, "conversations": float("nan"), "prompt": "Hello.", "completion": "Bonjour."},
    ],
)
def test_a_question_and_its_answer_are_a_plain_row(record: Any, tmp_path: Path):
    assert load_rows(write(tmp_path / "a.jsonl", record)) == [InstructionRow("Hello.", "", "Bonjour.")]


def test_calls_of_tools_and_their_results(tmp_path: Path):
    call = {"name": "add", "arguments": {"a": 2}}
    openai = {"role": "assistant", "content": None, "tool_calls": [{"function": {**call, "arguments": '{"a": 2}'}}]}
    asked, result, answer = ({"role": "user", "content": "2 + 2?"}, {"role": "tool", "content": "4"}, "Four.")
    tools = [{"name": "add"}]
    wanted = [
        (("system", 'Tools:\n[{"name": "add"}]'), ("user", "2 + 2?")),
        (("assistant", '{"name": "add", "arguments": {"a": 2}}'), ("tool", "4")),
    ]
    first, second = tuple(Message(*x) for x in cast(Any, wanted[0])), tuple(Message(*x) for x in cast(Any, wanted[1]))
    for record in (
        {"messages": [asked, openai, result, {"role": "assistant", "content": answer}], "tools": tools},
        {
            "conversations": [
                {"from": "human", "value": "2 + 2?"},
                {"from": "function_call", "value": json.dumps(call)},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": answer},
            ],
            "tools": json.dumps(tools),
        },
    ):
        found = examples_of(write(tmp_path / "a.jsonl", record))
        assert found == [(first, second[0].content), (first + second, answer)]


@pytest.mark.parametrize("name", ["tools", "functions"])
@pytest.mark.parametrize("record", [{"messages": TALK[:2]}, {"instruction": "Hello.", "output": "Bonjour."}])
def test_what_an_assistant_may_call_is_read_beside_every_format(name: str, record: dict[str, Any], tmp_path: Path):
    path = write(tmp_path / "a.jsonl", record | {name: [{"name": "add"}]})
    before = (Message("system", 'Tools:\n[{"name": "add"}]'), Message("user", "Hello."))
    assert examples_of(path) == [(before, "Bonjour.")]


def test_named_columns_come_first(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", {"ask": "a", "say": "b", "messages": TALK})
    assert load_rows(path, Columns("ask", None, "say")) == [InstructionRow("a", "", "b")]


def test_two_messages_of_a_user_both_stay(tmp_path: Path):
    talk = [{"role": "user", "content": "It rains."}, {"role": "user", "content": "In French?"}]
    path = write(tmp_path / "a.jsonl", {"messages": [*talk, {"role": "assistant", "content": "Il pleut."}]})
    assert examples_of(path) == [(messages(*talk), "Il pleut.")]
    row = load_rows(path)[0]
    assert NANO.decode(list(encode_prompt(row, PLAIN, NANO))) == "Instruction: It rains.\n\nIn French?\n\nResponse:\n"


def test_an_assistant_that_opens_is_context(tmp_path: Path):
    greeting = {"role": "assistant", "content": "How can I help?"}
    path = write(tmp_path / "a.jsonl", {"messages": [greeting, *TALK[:2]]})
    assert examples_of(path) == [(messages(greeting, TALK[0]), "Bonjour.")]
    assert load_examples(path).left_out == {UNPROMPTED: 1}


ASSISTANT, USER = {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "No?"}


@pytest.mark.parametrize(
    ("talk", "answers", "left_out"),
    [
        ([USER], 0, {WITHOUT_ANSWER: 1}),
        ([], 0, {WITHOUT_ANSWER: 1}),
        ([*TALK, USER, USER], 2, {UNANSWERED: 2}),
        ([*TALK, USER, {**ASSISTANT, "content": " "}], 2, {EMPTY_ANSWER: 1, UNANSWERED: 1}),
        ([USER, {**ASSISTANT, "content": None}, *TALK], 2, {EMPTY_ANSWER: 1}),
        ([{**SYSTEM, "content": ""}, *TALK], 2, {EMPTY: 1}),
        ([{**USER, "content": None}, ASSISTANT, *TALK], 2, {EMPTY: 1, UNPROMPTED: 1}),
        ([USER, {**ASSISTANT, "weight": 0}, *TALK], 2, {UNWEIGHTED: 1}),
        ([USER, {**ASSISTANT, "loss_weight": 0.0}, *TALK], 2, {UNWEIGHTED: 1}),
        ([USER, {**ASSISTANT, "train": False}, *TALK], 2, {UNWEIGHTED: 1}),
        ([{**USER, "weight": 1}, ASSISTANT], 1, {IGNORED: 1}),
        ([USER, {**ASSISTANT, "reasoning_content": "Well."}], 1, {REASONING: 1}),
    ],
)
def test_what_is_left_out_is_counted(talk: Any, answers: int, left_out: dict[str, int], tmp_path: Path):
    path = write(tmp_path / "a.jsonl", {"messages": TALK}, {"messages": talk})
    found = load_examples(path)
    assert len(found.rows) == 2 + answers
    assert found.left_out == left_out


def test_a_file_without_an_answer_says_why(tmp_path: Path):
    with pytest.raises(InputError, match=r"holds no rows, expected at least one; there are 1 conversations without an"):
        load_rows(write(tmp_path / "a.jsonl", {"messages": [USER]}))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [{"role": "narrator", "content": "x"}]}, r"line 1, message 1: unknown role 'narrator': expected"),
        ({"messages": [{"role": None, "content": "x"}]}, r"message 1: expected a role and content, or from and value"),
        ({"messages": [{"role": "user"}]}, r"message 1: no content: expected a text with the role 'user'"),
        ({"messages": ["Hi", USER]}, r"line 1: message 1 of 'messages' should be an object, got str"),
        ({"messages": None}, r"line 1: column 'messages' should hold a list of messages, got null"),
        ({"messages": "Hi"}, r"line 1: column 'messages' should hold a list of messages, got text that is not JSON"),
        ({"messages": [{**USER, "content": [{"type": "image_url"}]}]}, r"message 1: a part of the content is 'image_u"),
        ({"messages": [USER, {**ASSISTANT, "content": True}]}, r"message 2: content should be text, .* got bool"),
        ({"messages": [USER, {**ASSISTANT, "weight": -1}]}, r"message 2: weight is -1, expected a number of"),
        ({"messages": [USER, {**ASSISTANT, "train": "no"}]}, r"message 2: train is 'no', expected a number of"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [5]}]}, r"message 2: a tool call should name a function"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, r"line 1: a row of preference data \(chosen, rejected: DPO"),
        ({"messages": TALK, "label": True}, r"line 1: a row of preference data \(.*: KTO's format\)"),
        ({"prompt": "a", "completion": "b", "label": False}, r"line 1: a row of preference data .*: KTO's format\)"),
        ({"prompt": "a", "completion": "b", "label": "False"}, r"line 1: a row of preference data .*: KTO's format\)"),
        ({"messages": TALK, "conversations": ["a", "b"]}, r"line 1: columns 'messages' and 'conversations' differ"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, r"line 1: history should hold pairs of question and"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_row(record: Any, message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message) as caught:
        load_rows(write(tmp_path / "a.jsonl", record))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "count"),
    [("chat/messages_demo.jsonl", 500), ("chat/sharegpt_tools_demo.json", 957), ("lima/lima.json", 1082)],
)
def test_real_conversations(name: str, count: int, shared_data: SharedData):
    found = load_examples(shared_data(name))
    assert len(found.rows) == count  # 746 answers and 211 calls of functions; 1,029 rows and 53 exchanges before them
    assert not found.left_out
    assert all(encode(row, PLAIN, NANO).prompt_length < len(encode(row, PLAIN, NANO).tokens) for row in found.rows[:40])


@pytest.mark.parametrize("name", ["preference/dpo_en_demo.json", "preference/kto_en_demo.json"])
def test_real_preferences_are_refused(name: str, shared_data: SharedData):
    path = shared_data(name)
    with pytest.raises(InputError, match=r"row 1: a row of preference data"):
        load_rows(path)


# ----------------------------------------------------------------------------------------------------------- templates

FRENCH = Turn("", "", "Bonne nuit.", messages(SYSTEM, *TALK[:3]))
BELOW = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"


def test_what_a_conversation_looks_like():
    end = "<|endoftext|>"
    wanted = {
        "alpaca": f"Answer in French.\n\n{BELOW}### Instruction:\nHello.\n\n### Response:\nBonjour.{end}"
        f"{BELOW}### Instruction:\nGood night.\n\n### Response:\n",
        "plain": f"Answer in French.\n\nInstruction: Hello.\n\nResponse:\nBonjour.{end}"
        "Instruction: Good night.\n\nResponse:\n",
        "tulu": f"<|system|>\nAnswer in French.\n<|user|>\nHello.\n<|assistant|>\nBonjour.{end}"
        "<|user|>\nGood night.\n<|assistant|>\n",
    }
    for name, text in wanted.items():
        example = encode(FRENCH, TEMPLATES[name], NANO)
        assert NANO.decode(list(example.tokens)) == f"{text}Bonne nuit.{end}", name
        assert NANO.decode(list(example.tokens[: example.prompt_length])) == text
        assert example.tokens[: example.prompt_length].count(NANO.eos) == 1


def test_a_tool_and_an_assistant_that_goes_on():
    talk = [USER, ASSISTANT, {"role": "tool", "content": "4"}, ASSISTANT]
    turns = PLAIN.turns(messages(*talk))
    assert turns == [
        ("Instruction: No?\n\nResponse:\n", "Yes."),
        ("Tool: 4\n\nResponse:\n", "Yes."),
        ("Response:\n", None),
    ]
    assert TULU.turns(messages(*talk[:3]))[1] == ("<|tool|>\n4\n<|assistant|>\n", None)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4), st.sampled_from([ALPACA, PLAIN, TULU]))
def test_a_turn_s_prompt_is_the_example_before_it_and_the_next_question(talk: list[tuple[str, str]], look: Any):
    """So a model is asked in the words that it was trained on, token by token; and one turn is a plain row."""
    said: list[Message] = []
    before: tuple[int, ...] = ()
    for question, answer in talk:
        said.append(Message("user", question))
        example = encode(Turn("", "", answer, tuple(said)), look, NANO)
        alone = encode(InstructionRow(question, "", answer), look, NANO)
        assert example.tokens == (*before, *alone.tokens)
        assert example.prompt_length == len(before) + alone.prompt_length
        said.append(Message("assistant", answer))
        before = example.tokens
    batch = collate([[encode(Turn("", "", talk[-1][1], tuple(said[:-1])), look, NANO)]])
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
    row = Turn("", "", "x", messages(*TALK[:1]), conversation="a.jsonl, line 3")
    with pytest.raises(InputError, match=r"^a\.jsonl, line 3: the model's chat template fails .*roles must alternate"):
        encode(row, CHAT, strict)


@pytest.mark.parametrize("name", ["alpaca", "plain", "tulu"])
def test_a_chat_asks_in_the_words_of_training(name: str):
    run = cast(InstructionRecipe, find("lora-nano"))
    opened = LoadedRun(replace(run, template=name), cast(Any, None), NANO)
    said = [InstructionRow("Hello.", "", "Bonjour."), InstructionRow("Good night.")]
    trained = encode(Turn("", "", "Bonne nuit.", messages(*TALK[:3])), TEMPLATES[name], NANO)
    assert encode_conversation(opened, said) == list(trained.tokens[: trained.prompt_length])


# -------------------------------------------------------------------------------------------- weights, held out, shown


def test_a_loss_weight_reaches_the_loss(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", {"messages": [USER, {**ASSISTANT, "weight": 0.25}]})
    (row,) = load_rows(path)
    example = encode(row, PLAIN, NANO)
    batch = collate([[example]])
    assert batch.weights.sum() == 0.25 * (len(NANO.encode("Yes.")) + 1)
    assert set(batch.weights.flatten().tolist()) == {0.0, 0.25}
    assert truncate(example, example.prompt_length + 2).weight == 0.25


@given(st.lists(st.integers(1, 5), min_size=2, max_size=20), st.integers(0, 9), st.integers(0, 3))
def test_no_conversation_is_on_both_sides(lengths: list[int], heldout: int, seed: int):
    talks = [Turn(str(i), conversation=f"line {n}") for n, length in enumerate(lengths) for i in range(length)]
    first, second = train_heldout_split(talks, heldout, seed)
    assert first
    assert not {row.conversation for row in first} & {row.conversation for row in second}
    assert Counter(first) + Counter(second) == Counter(talks)
    assert len(second) >= min(heldout, sum(lengths) - max(lengths))
    assert len(second) < heldout + max(lengths)


def test_one_conversation_cannot_be_held_out():
    with pytest.raises(InputError, match="all 3 rows are of one conversation"):
        train_heldout_split([Turn(str(i), conversation="line 1") for i in range(3)], 1, 0)


def test_a_run_says_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write(tmp_path / "a.jsonl", *[{"messages": [*TALK, USER]}] * 9, {"messages": [USER]})
    recipe = replace(cast(InstructionRecipe, find("lora-nano")), data=str(path), num_heldout=4)
    first, second = load_instruction_split(recipe)
    assert len(first) + len(second) == 18
    assert len(second) == 4
    said = " ".join(capsys.readouterr().err.split())
    assert "1 conversations without an answer of the assistant, 9 messages after the last answer" in said


def test_a_comparison_shows_the_whole_prompt(tmp_path: Path):
    (_, row) = load_rows(write(tmp_path / "a.jsonl", {"messages": [SYSTEM, *TALK]}))
    answers = {"base": [Answer("Gute Nacht.", (1,), True)], "tuned": [Answer("Bonne nuit.", (1,), True)]}
    found = Comparison("a", [], [row], answers, {"base": {}, "tuned": {}}, {})
    for page in (to_markdown(found), html_page(found)):
        for text in ("Answer in French.", "Hello.", "Bonjour.", "Good night.", "Bonne nuit."):
            assert text in page
