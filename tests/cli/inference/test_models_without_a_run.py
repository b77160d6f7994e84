"""`fgpt generate` and `fgpt chat` with models that no run has: embedded ones, folders, merged and pretrained ones."""

from pathlib import Path

import pytest
from builders.runs import one_line

import fgpt
from fgpt.cli import run_dir
from fgpt.cli.inference.generation import chat, load_run
from fgpt.cli.inference.options import DEFAULT_SAMPLING
from fgpt.cli.main import main
from fgpt.generation.loop import generate


def test_a_model_continues_a_text(capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "nano", "Once upon a time", "--max-new-tokens", "6"]) == 0
    tokenizer = fgpt.tokenizer("nano")
    prompt = tokenizer.encode("Once upon a time")
    (output,) = generate(fgpt.load("nano"), [prompt], eos_token_id=tokenizer.eos_token_ids, max_new_tokens=6)
    assert capsys.readouterr().out.strip() == tokenizer.decode(output.tokens).strip()


def test_a_folder_of_a_model_and_a_template(project: Path, capsys: pytest.CaptureFixture[str]):
    base = str(project / "base")
    assert load_run(base).recipe.template == "none"
    assert load_run(base, "alpaca").recipe.template == "alpaca"
    assert main(["generate", base, "hi", "--template", "nothing"]) == 2
    assert "nothing" in one_line(capsys)
    lines = iter(["hello", "/quit"])
    chat(base, DEFAULT_SAMPLING, read=lambda _: next(lines))
    assert "base" in capsys.readouterr().out


def test_a_merged_folder_has_the_template_of_its_run(project: Path, capsys: pytest.CaptureFixture[str]):
    run = project / "runs" / "it[b]"
    assert main(["merge", str(run)]) == 0
    capsys.readouterr()
    template = run_dir.instruction_run(run).template
    assert load_run(str(run / "merged")).recipe.template == template
    texts = []
    for name in (run, run / "merged"):
        assert main(["generate", str(name), "Say 3.", "--max-new-tokens", "5"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_what_generates_nothing_is_refused(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", str(project / "runs" / "told[b]"), "hi"]) == 2
    assert "classif" in one_line(capsys)
    assert main(["generate", str(tmp_path), "hi"]) == 2
    assert "no trained run" in one_line(capsys)


def test_a_run_comes_before_a_model_of_its_name(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(project)
    assert run_dir.is_model("nano")
    assert run_dir.is_model("gpt2-medium")
    assert run_dir.is_model("owner/model@main")
    assert not run_dir.is_model("it[b]")
    assert not run_dir.is_model("runs/it[b]")
    assert not run_dir.is_model("lora-nano")
