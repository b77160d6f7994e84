"""A training on raw text, and what is done with it afterwards."""

import json
from pathlib import Path
from typing import Any

import pytest

import fgpt
from fgpt.cli.inference import generation
from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics


@pytest.fixture(scope="module")
def text_run(training_args: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its texts are longer than its rows; one ends with a part of a single token to be predicted."""
    at = tmp_path_factory.mktemp("texts")
    rows = [{"text": " ".join(["Once there was a fox."] * (10 + i % 9))} for i in range(40)]
    (at / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data", str(at / "texts.jsonl"), "--num-heldout", "0.5", "--steps", "2", "--eval-every", "2"]
    assert main(["train", *training_args["instruct"], *options, "--no-keep-best", "--out", str(at / "runs")]) == 0
    return at / "runs" / "lora-nano"


def test_the_held_out_loss_of_texts_longer_than_a_row_is_that_of_the_training(text_run: Path):
    assert main(["eval", "run", str(text_run)]) == 0
    evaluated: Any = json.loads((text_run / "eval.json").read_text())["held out"]
    assert evaluated["rows left out"] == 0
    assert evaluated["rows"] > 20
    losses = [line["heldout_loss"] for line in read_metrics(text_run / "metrics.jsonl") if "heldout_loss" in line]
    assert evaluated["response loss (nats per token)"] == pytest.approx(losses[-1], rel=1e-5)


@pytest.mark.parametrize("command", [["compare"], ["eval", "run", "--num-generations", "2"]])
def test_raw_text_has_no_prompts_to_answer(command: list[str], text_run: Path, capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    assert main([*command, str(text_run)]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "lora-nano held out raw text, and no prompts: give --prompts FILE" in message


def test_a_run_that_held_out_nothing_can_be_merged(
    training_args: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "one.txt").write_text("Once there was a fox. " * 60)
    options = ["--data", str(tmp_path / "one.txt"), "--steps", "2", "--eval-every", "None", "--no-keep-best"]
    args = ["train", *training_args["instruct"], *options, "--out", str(tmp_path / "runs")]
    assert main(args) == 2
    assert "one.txt has 1 rows: expected 2 or more, one of them to be held out; add some, or hold out none" in (
        " ".join(capsys.readouterr().err.split())
    )
    assert main([*args, "--num-heldout", "0"]) == 0
    assert "with --template none it continues a text" in " ".join(capsys.readouterr().err.split())
    assert main(["merge", str(tmp_path / "runs" / "lora-nano")]) == 0
    report = json.loads((tmp_path / "runs" / "lora-nano" / "merged" / "merge.json").read_text())
    assert report["rows"] > 1


def test_a_run_on_texts_without_a_template_continues_a_text(
    training_args: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "one.txt").write_text("Once there was a fox. " * 60)
    options = ["--data", str(tmp_path / "one.txt"), "--num-heldout", "0", "--template", "none", "--steps", "2"]
    options += ["--eval-every", "None", "--no-keep-best", "--out", str(tmp_path / "runs")]
    assert main(["train", *training_args["instruct"], *options]) == 0
    prompts: list[list[int]] = []
    monkeypatch.setattr(generation, "stream", lambda params, given, **options: prompts.extend(map(list, given)) or [])
    run = str(tmp_path / "runs" / "lora-nano")
    assert main(["generate", run, "Once there"]) == 0
    assert prompts == [fgpt.tokenizer("nano").encode("Once there")]
