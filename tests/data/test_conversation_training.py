"""Conversations in training and comparison: loss weights, held-out conversations."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from builders.conversations import ASSISTANT, SYSTEM, TALK, USER, messages_row, write_json_rows
from hypothesis import given
from hypothesis import strategies as st

import fgpt
from fgpt.cli.evaluation.compare.html import page as html_page
from fgpt.cli.evaluation.compare.markdown import to_markdown
from fgpt.cli.evaluation.compare.results import Answer, Comparison
from fgpt.cli.training.examples import load_instruction_data, train_heldout_split
from fgpt.data.examples import truncate
from fgpt.data.instruction_datasets import load_rows
from fgpt.data.packing import collate
from fgpt.data.prompt_templates import PLAIN, Turn, encode
from fgpt.data.rows import conversation_row, turns_of
from fgpt.errors import InputError
from fgpt.recipes import InstructionRecipe, find
from fgpt.tokenizers.tiktoken_bpe import RANKS, from_ranks

NANO = from_ranks(Path(fgpt.__file__).parent / "nano" / RANKS)


def test_a_loss_weight_reaches_the_loss(tmp_path: Path):
    path = write_json_rows(tmp_path / "a.jsonl", {"messages": [USER, {**ASSISTANT, "weight": 0.25}]})
    (row,) = load_rows(path)
    example = encode(row, PLAIN, NANO)
    batch = collate([[example]])
    assert batch.weights.sum() == 0.25 * (len(NANO.encode("Yes.")) + 1)
    assert set(batch.weights.flatten().tolist()) == {0.0, 0.25}
    assert truncate(example, example.prompt_length + 2).spans[0].weight == 0.25


@given(st.integers(2, 20), st.integers(0, 9), st.integers(0, 3))
def test_a_conversation_is_on_one_side(count: int, heldout: int, seed: int):
    talks = [conversation_row(messages_row(*TALK), f"line {n}") for n in range(count)]
    first, second = train_heldout_split(talks, heldout, seed)
    assert first
    assert not {row.conversation for row in first} & {row.conversation for row in second}
    assert Counter(first) + Counter(second) == Counter(talks)
    assert len(second) == min(heldout, count - 1)


def test_rows_of_single_answers_are_held_out_as_ever():
    """The rows of a seed, which recorded figures are of."""
    assert train_heldout_split(range(9), 3, 0)[1] == [1, 6, 8]
    assert train_heldout_split(range(9), 3, 1)[1] == [0, 5, 8]


def test_one_conversation_cannot_be_held_out(tmp_path: Path):
    path = write_json_rows(tmp_path / "a.jsonl", {"messages": TALK})
    recipe = replace(cast(InstructionRecipe, find("lora-nano")), data=(str(path),))
    with pytest.raises(InputError, match=r"a\.jsonl has 1 rows: expected 2 or more, one of them to be held out"):
        load_instruction_data(recipe)


def test_a_run_says_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_json_rows(tmp_path / "a.jsonl", *[{"messages": [*TALK, USER]}] * 9, {"messages": [USER]})
    recipe = replace(cast(InstructionRecipe, find("lora-nano")), data=(str(path),), num_heldout=4)
    data = load_instruction_data(recipe)
    assert [len(example.spans) for example in data.examples] == [2] * 5
    assert len(data.heldout) == 8  # a turn for each of the two answers of four conversations
    assert all(isinstance(row, Turn) for row in data.heldout)
    output = " ".join(capsys.readouterr().err.split())
    assert "1 conversations without an answer of the assistant, 9 messages after the last answer" in output


def test_a_comparison_shows_the_whole_prompt(tmp_path: Path):
    (_, row) = turns_of(load_rows(write_json_rows(tmp_path / "a.jsonl", {"messages": [SYSTEM, *TALK]})))
    answers = {"base": [Answer("Gute Nacht.", (1,), True)], "tuned": [Answer("Bonne nuit.", (1,), True)]}
    found = Comparison("a", [], [row], answers, {"base": {}, "tuned": {}}, {})
    for page in (to_markdown(found), html_page(found)):
        for text in ("Answer in French.", "Hello.", "Bonjour.", "Good night.", "Bonne nuit."):
            assert text in page
