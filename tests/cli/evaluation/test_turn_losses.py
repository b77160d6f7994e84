"""The loss of a conversation's answers, turn by turn, is that of each answer by itself."""

import json
from pathlib import Path

import pytest

from fgpt.cli.evaluation.metrics.text import response_losses
from fgpt.cli.main import main
from fgpt.data.conversations import Message
from fgpt.data.rows import conversation_row, turn_number, turns_of
from fgpt.evaluation.likelihood import LogLikelihood


def likelihood(*nats: float) -> LogLikelihood:
    return LogLikelihood([-x for x in nats], [True] * len(nats))


def test_a_table_worked_by_hand():
    answers = [likelihood(1, 3), likelihood(5), likelihood(2, 2, 2), likelihood(7)]
    assert response_losses(answers, [1, 2, 1, 2]) == {
        "response loss (nats per token)": pytest.approx(22 / 7),
        "loss of response 1": pytest.approx(2),
        "loss of response 2": pytest.approx(6),
    }
    assert response_losses(answers, [1, 1, 1, 1]).keys() == {"response loss (nats per token)"}
    late = response_losses(answers, [4, 5, 6, 1])
    assert late["loss of response 5 and later"] == pytest.approx(11 / 4)
    assert list(late)[1:] == ["loss of response 1", "loss of response 4", "loss of response 5 and later"]


def test_turns_are_numbered_by_the_answers_before_them():
    chat = [Message("user", "Hi."), Message("assistant", "Yes?"), Message("user", "Sing."), Message("assistant", "La.")]
    assert [turn_number(turn) for turn in turns_of([conversation_row(chat)])] == [1, 2]


@pytest.mark.slow
def test_evaluation_and_comparison_show_each_turn(tmp_path: Path):
    answers = ("A red ball.", "Tim has it.", "It is late.")
    messages = [
        message
        for answer in answers
        for message in ({"role": "user", "content": "And now?"}, {"role": "assistant", "content": answer})
    ]
    (tmp_path / "chat.jsonl").write_text(12 * (json.dumps({"messages": messages}) + "\n"))
    train = ["train", "lora-nano", "--data", str(tmp_path / "chat.jsonl"), "--steps", "1", "--num-heldout", "2"]
    assert main([*train, "--compare-prompts", "6", "--max-new-tokens", "2", "--out", str(tmp_path)]) == 0
    assert main(["eval", "run", str(tmp_path / "lora-nano")]) == 0
    names = ["loss of response 1", "loss of response 2", "loss of response 3"]
    evaluation = json.loads((tmp_path / "lora-nano" / "eval.json").read_text())["held out"]
    tuned = json.loads((tmp_path / "lora-nano" / "compare.json").read_text())["scores"]["tuned"]
    assert [evaluation[name] for name in names] == [
        pytest.approx(tuned[f"held-out {name}"], abs=1e-5) for name in names
    ]
    assert len({evaluation[name] for name in names}) == 3
