"""GRPO from the command line: what a run leaves, that it resumes exactly, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.runs import copy_interrupted, one_line

from fgpt.cli import run_dir
from fgpt.cli.evaluation.rewards import gsm8k_reward, nano_reward
from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.training.nano_rows import STORY, Task
from fgpt.cli.training.rollout_job import collate_prompts, prompt_batches, prompts_of
from fgpt.data.prompt_templates import InstructionRow
from fgpt.recipes import GRPORecipe, find
from fgpt.tree import leaves

SHORT = ["--steps", "4", "--micro-batch-size", "8", "--grad-accumulation-steps", "2", "--max-completion-length", "40"]
SHORT += ["--lr", "1e-3", "--beta", "0.1", "--compare-prompts", "2", "--max-new-tokens", "4", "--eval-every", "2"]
SHORT += ["--num-generations", "8", "--no-scale-rewards", "--span-words", "8"]


@pytest.fixture(scope="module")
def grpo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("grpo")
    often = ["--checkpoint-every-minutes", "0", "--keep-checkpoints", "9"]
    assert main(["train", "grpo-nano", *SHORT, *often, "--out", str(out)]) == 0
    return out / "grpo-nano"


@pytest.mark.slow
def test_a_run_leaves_its_figures(grpo_run: Path):
    lines = read_metrics(grpo_run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6)  # the policy is the base, up to rounding
    for line in lines:
        assert line["kl"] >= 0
        assert 0 <= line["frac_reward_zero_std"] <= 1
        assert 0 < line["mean_completion_length"] <= 40
        assert line["sampled_tokens"] == 16 * line["mean_completion_length"]
        assert 0 <= line["reward"] <= 1
        assert line["span_ratio"] in (0, 0.5, 1)
    assert any(line["span_ratio"] for line in lines)
    assert "heldout_loss" in lines[1]
    assert {"adapter", "compare.json", "loss.png", "checkpoints"} <= {path.name for path in grpo_run.iterdir()}
    run = run_dir.read_run(grpo_run)
    assert isinstance(run, GRPORecipe)
    assert run.prompts_per_update == 2
    assert main(["generate", str(grpo_run), "Write a story about a fox.", "--max-new-tokens", "3"]) == 0
    assert main(["report", str(grpo_run)]) == 0


@pytest.mark.slow
def test_it_resumes_exactly(grpo_run: Path, tmp_path: Path):
    """After step 2 it samples the answers of step 3 that the undisturbed training sampled."""
    resumed = tmp_path / "grpo-nano"
    copy_interrupted(grpo_run, resumed, after=2)
    assert main(["train", str(resumed), "--resume", "--out", str(tmp_path)]) == 0
    timed = ("seconds", "memory_gb")
    for ours, theirs in zip(*(read_metrics(at / "metrics.jsonl") for at in (resumed, grpo_run)), strict=True):
        assert {k: v for k, v in ours.items() if k not in timed} == {k: v for k, v in theirs.items() if k not in timed}
    last = [path / "checkpoints" / "step-000004" / "state.safetensors" for path in (resumed, grpo_run)]
    assert last[0].read_bytes() == last[1].read_bytes()


@pytest.mark.slow
def test_any_step_is_replayed(grpo_run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["replay", str(grpo_run), "--step", "3"]) == 0
    output = capsys.readouterr().err
    assert "Instruction:" in output


# -------------------------------------------------------------------------------------------------------- its prompts


def test_prompts_are_a_function_of_the_update():
    recipe: Any = replace(find("grpo-nano"), micro_batch_size=32, num_generations=8)
    prompts = [[i] * (1 + i % 5) for i in range(1, 41)]  # 16 in an update, the third has 8 that are left
    whole = prompt_batches(prompts, recipe)
    updates = [next(whole)[0] for _ in range(7)]
    assert [len(x.tokens) for x in updates] == [16, 16, 8, 16, 16, 8, 16]
    for begin, expected in enumerate(updates):
        assert all(
            map(
                torch.equal, leaves(next(prompt_batches(prompts, recipe, begin))[0]).values(), leaves(expected).values()
            )
        )
    rows = torch.cat([x.rows for x in updates[:3]])  # pyright: ignore
    assert sorted(rows.tolist()) == list(range(40))
    assert rows.tolist() != torch.cat([x.rows for x in updates[3:6]]).tolist()  # pyright: ignore


def test_prompts_come_back_from_their_batch():
    prompts = [[1, 2, 3], [4], [5, 6]]
    assert prompts_of(collate_prompts(prompts, [2, 0, 1])) == [[5, 6], [1, 2, 3], [4]]


# --------------------------------------------------------------------------------------------------------- its reward


def question(answer: str) -> Task:
    return Task("Who is it?", "It is Leo.", "", "who", {"answer": answer})


STORY_TEXT = (
    "Long ago, there was a fox named Tim. He liked to run in the big green park with his friend, a small bird. One day "
    "they found a shiny red ball under some old trees and played until night came."
)


def test_a_question_s_reward_by_hand():
    assert nano_reward(question("Leo."), "leo", True) == 1.0
    assert nano_reward(question("To the zoo."), "To the zoo.", False) == pytest.approx(1 / 3)  # all words, no end
    near = (6 / 7 + 2 / 3 + 3 / 4) / 3  # F1, two of three words at the start, three words for four
    assert nano_reward(question("To the zoo."), "To the big zoo.", True) == pytest.approx(0.5 * near)
    assert nano_reward(question("Leo."), "No.", True) == pytest.approx(0.5 / 3)  # of the right length
    assert nano_reward(question("Leo."), "", True) == 0.0


def test_a_story_s_reward_by_hand():
    requires = {"kind": "fox", "name": "Tom", "opening": "Long ago", "ending": "The end."}
    story = Task("Write a story about a fox named Tom.", "", "", STORY, requires)
    assert nano_reward(story, STORY_TEXT, True) == pytest.approx(3 / 5)  # fox, opening, finished
    assert nano_reward(story, STORY_TEXT, False) == pytest.approx(2 / 5)
    assert nano_reward(story, "A" + STORY_TEXT[4:] + " The end.", True) == pytest.approx(3 / 5)
    assert nano_reward(story, STORY_TEXT.replace("ago", "before") + " At the end.", True) == pytest.approx(
        (1 + 0 + 0.25 + 1 + 1) / 5
    )
    assert nano_reward(story, "Long ago there was a fox named Tom. The end.", True) == 0.0  # too short


def test_gsm8k_s_reward():
    assert gsm8k_reward(InstructionRow("How many?", "", "#### 72"), "It makes 72.", True) == 1.0


# --------------------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-generations", "1"], "expected 2 or more"),
        (["--num-generations", "5"], "144 answers in a step: expected a multiple of --num-generations 5"),
        (["--reward", "gsm8k"], "cannot judge row 1"),
        (["--max-completion-length", "500"], "lower it, or give --overlong drop"),
        (["--max-completion-length", "511", "--overlong", "drop"], "no prompt is left"),
        (["--max-completion-length", "0"], "expected 1 or more"),
        (["--beta", "-1"], "expected 0 or more"),
        (["--keep-best"], "--eval-every N"),
        (["--cuda-graphs"], "sampled answers have many"),
    ],
)
def test_bad_options(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "grpo-nano", *options, "--out", str(tmp_path)]) == 2
    assert message in one_line(capsys)


@pytest.mark.slow
def test_rows_without_an_input_to_search(instruction_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--data", str(instruction_file), "--reward", "gsm8k", "--num-heldout", "4", "--steps", "1"]
    assert main(["train", "grpo-nano", *SHORT, *options, "--eval-every", "1", "--out", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "no row has an input whose spans could be tried as answers (--span-words 8)" in shown
    assert read_metrics(tmp_path / "grpo-nano" / "metrics.jsonl")[0]["span_ratio"] == 0


# -------------------------------------------------------------------------------------------------- spans of its input


TINY = ["--reward", "gsm8k", "--template", "plain", "--num-heldout", "1", "--steps", "1", "--num-generations", "2"]
TINY += ["--micro-batch-size", "2", "--grad-accumulation-steps", "1", "--compare-prompts", "0", "--beta", "0"]
LONG_WORD = "qz" * 200 + "7"
"""Some 400 tokens of nano: with a prompt that holds it, more than the context."""


@pytest.mark.slow
@pytest.mark.parametrize(("input_text", "ratio"), [(LONG_WORD, 0.0), (f"{LONG_WORD} 7", 1.0)])
def test_a_span_is_an_answer_of_few_enough_tokens(input_text: str, ratio: float, tmp_path: Path):
    """Both words end in the right number; one with its prompt is longer than the context."""
    rows = [{"instruction": "How many?", "input": input_text, "output": "7"}] * 3
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = ["--data", str(tmp_path / "rows.json"), *TINY, "--max-completion-length", "4", "--span-words", "9"]
    assert main(["train", "grpo-nano", *options, "--out", str(tmp_path)]) == 0
    (line,) = read_metrics(tmp_path / "grpo-nano" / "metrics.jsonl")
    assert line["reward"] == 0  # nothing that was sampled ends in a 7: the span is better
    assert line["span_ratio"] == ratio


def test_spans_alone_move_the_trained_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """All sampled answers have reward 0, but a step that learns a span has a gradient: at such a rate it is lost."""
    rows = [{"instruction": "How many?", "input": "There are 7", "output": "7"}] * 3
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = ["--data", str(tmp_path / "rows.json"), *TINY, "--max-completion-length", "4", "--span-words", "1"]
    options += ["--steps", "2", "--optimizer", "adamw", "--adapter.kind", "ln", "--adapter.target", r".*ln_.*\.w"]
    assert main(["train", "grpo-nano", *options, "--lr", "1e-12", "--out", str(tmp_path)]) == 2
    assert "trained leaves did not change in two steps" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_rows_with_an_input_that_are_left_out_are_not_searched(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    long, short = " ".join([LONG_WORD] * 3), ""
    rows = [{"instruction": "How many?", "input": text, "output": "7"} for text in [long, short] * 4]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = ["--data", str(tmp_path / "rows.json"), *TINY, "--overlong", "drop", "--span-words", "9"]
    assert main(["train", "grpo-nano", *options, "--out", str(tmp_path)]) == 0
    assert "no row has an input whose spans could be tried" in " ".join(capsys.readouterr().err.split())


def test_rows_that_nothing_can_judge(instruction_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        main(["train", "grpo-nano", "--data", str(instruction_file), "--num-heldout", "4", "--out", str(tmp_path)]) == 2
    )
    assert "error: --reward nano cannot judge row 1" in capsys.readouterr().err.strip().splitlines()[-1]
