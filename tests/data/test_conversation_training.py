"""Conversations in training and comparison: loss weights, held-out conversations."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from builders.conversations import ASSISTANT, SYSTEM, TALK, USER, write_json_rows
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
    path = write_json_rows(tmp_path / "a.jsonl", *[{"messages": [*TALK, USER]}] * 9, {"messages": [USER]})
    recipe = replace(cast(InstructionRecipe, find("lora-nano")), data=(str(path),), num_heldout=4)
    data = load_instruction_data(recipe)
    assert len(data.examples) == 14
    assert len(data.heldout) == 4
    output = " ".join(capsys.readouterr().err.split())
    assert "1 conversations without an answer of the assistant, 9 messages after the last answer" in output


def test_a_comparison_shows_the_whole_prompt(tmp_path: Path):
    (_, row) = load_rows(write_json_rows(tmp_path / "a.jsonl", {"messages": [SYSTEM, *TALK]}))
    answers = {"base": [Answer("Gute Nacht.", (1,), True)], "tuned": [Answer("Bonne nuit.", (1,), True)]}
    found = Comparison("a", [], [row], answers, {"base": {}, "tuned": {}}, {})
    for page in (to_markdown(found), html_page(found)):
        for text in ("Answer in French.", "Hello.", "Bonjour.", "Good night.", "Bonne nuit."):
            assert text in page
