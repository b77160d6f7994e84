"""`fgpt eval` of a text and of a run's held-out rows."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import fgpt
from fgpt.cli.main import main
from fgpt.data import packing
from fgpt.data.prompt_templates import encode, template
from fgpt.evaluation.likelihood import (
    loglikelihood_rolling,
    perplexity,
)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    output = capsys.readouterr().err.strip().splitlines()
    assert len(output) == 1, output
    assert output[0].startswith("error: ")
    return output[0]


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    short = ["--steps", "2", "--micro-batch-size", "2", "--compare-prompts", "0", "--warmup-steps", "1"]
    assert main(["train", "lora-nano", *short, "--out", str(out)]) == 0
    return out / "lora-nano"


def test_eval_of_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = "One day, Tim's fox went out.\r\nIt was naïve!\n" * 30
    (tmp_path / "text.txt").write_bytes(text.encode())
    options = [str(tmp_path / "text.txt"), "--window", "64", "--stride", "48", "--out", str(tmp_path)]
    assert main(["eval", "text", "--base", "nano", *options]) == 0
    output, found = capsys.readouterr().err, json.loads((tmp_path / "eval.json").read_text())["text"]
    params, tokenizer = fgpt.load("nano"), fgpt.tokenizer("nano")
    expected = perplexity(
        loglikelihood_rolling(
            params, tokenizer.encode(text), bos_token_id=tokenizer.eos_token_id, width=64, stride=48
        ).logprobs,
        text,
    )
    assert (found["tokens"], found["bytes"], found["words"]) == (expected.tokens, len(text.encode()), 270)
    assert found["perplexity per token"] == pytest.approx(expected.per_token, rel=1e-5)
    assert found["word perplexity"] == pytest.approx(expected.per_word, rel=1e-4)
    assert f"{expected.bits_per_byte:.4f}" in output


@pytest.mark.slow
def test_eval_of_a_run_is_its_loss_on_what_it_held_out(text_run: Path):
    from fgpt.cli import run_dir
    from fgpt.cli.training.build import load_base
    from fgpt.cli.training.examples import load_heldout_rows

    assert main(["eval", "run", str(text_run), "--limit", "7", "--batch-size", "3"]) == 0
    found = json.loads((text_run / "eval-limit-7.json").read_text())["held out"]
    run: Any = run_dir.read_run(text_run)
    params, tokenizer = run_dir.load_tuned(text_run, load_base(run)), fgpt.tokenizer("nano")
    examples = [encode(row, template(run.template), tokenizer) for row in load_heldout_rows(run)[:7]]
    expected = fgpt.loss(params, packing.collate([[example] for example in examples]))
    assert found["response loss (nats per token)"] == pytest.approx(float(expected), rel=1e-5)
    assert found["response perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert (found["rows"], found["rows left out"]) == (7, 0)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["text", "TEXT"], "expected one of --base MODEL and --run RUN"),
        (["text", "TEXT", "--base", "nano", "--run", "r"], "expected one of --base MODEL and --run RUN"),
        (["run", "nosuch"], "no trained run 'nosuch' .* fgpt eval text FILE --base nosuch"),
        (["text", "nosuch.txt", "--base", "nano"], "nosuch.txt: No such file or directory; expected a text file"),
        (["text", "EMPTY", "--base", "nano"], "is empty: expected a text"),
        (["text", "BYTES", "--base", "nano"], r"not a text in UTF-8 \(byte 2\)"),
        (["text", "TEXT", "--base", "nano", "--window", "64", "--stride", "65"], "expected 1 <= stride <= width"),
        (["text", "TEXT", "--base", "nano", "--window", "513"], "wider than the model's context of 512"),
        (["text", "TEXT", "--base", "nano", "--batch-size", "0"], "--batch-size is 0: expected 1 or more"),
        (["text", "TEXT", "--base", "nano", "--windw", "8"], "no option --windw; did you mean --window"),
        (["text", "TEXT", "--base", "nosuch/"], "nosuch/"),
    ],
)
def test_bad_input_is_one_line(args: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, data in (("EMPTY", b" \n"), ("BYTES", b"ab\xff"), ("TEXT", b"a fox")):
        (tmp_path / name).write_bytes(data)
    at = [str(tmp_path / arg) if arg in ("EMPTY", "BYTES", "TEXT") else arg for arg in args]
    assert main(["eval", *at]) == 2
    line = one_line(capsys)
    assert re.search(says, line), line


def test_a_missing_lm_eval_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert main(["eval", "tasks", "hellaswag", "--base", "nano"]) == 2
    assert "pip install 'fgpt[eval]', or in a clone just setup-eval" in one_line(capsys)
