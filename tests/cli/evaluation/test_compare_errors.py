"""A comparison that cannot be made is one line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from builders.compare import RUN_NAMES, comparison_of

import fgpt
from fgpt.cli import run_dir
from fgpt.cli.evaluation.compare import contenders as compare_sides
from fgpt.cli.main import main
from fgpt.io import models


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    output = capsys.readouterr().err.strip().splitlines()
    assert len(output) == 1, output
    assert output[0].startswith("error: ")
    return output[0]


def test_bad_input_is_one_line(
    compared_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """And comes before any model is loaded; nothing is left half-made."""
    monkeypatch.setattr(compare_sides, "load_params", None)
    lora, ia3 = (str(compared_runs / name) for name in RUN_NAMES)
    files = {
        "empty.json": "",
        "none.json": "[]",
        "broken.json": '["a", ',
        "object.json": '{"instruction": "a"}',
        "broken.jsonl": '"a"\n{"instruction": \n',
        "number.json": "[7]",
        "blank.json": '["a", " "]',
        "column.json": '[{"prompt": "a"}]',
        "null.json": '[{"instruction": null}]',
        "list.json": '[{"instruction": "a", "input": ["b"]}]',
        "long.json": json.dumps(["a fox", "ran " * 2000]),
        "prompts.md": "a",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "file").write_text("")
    cases = [
        (["compare"], "expected one or more runs"),
        (["compare", lora, "nothing"], "no trained run 'nothing'"),
        (["compare", lora, ia3, lora + "/"], "lora-nano is given 2 times"),
        (["compare", lora, "--prompts", "missing.json"], "no prompt file 'missing.json'"),
        (["compare", lora, "--prompts", str(tmp_path)], "no prompt file"),
        (["compare", lora, "--prompts", "generl"], "one of general"),
        (["compare", lora, "--num-prompts", "0"], "--num-prompts is 0"),
        (["compare", lora, "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["compare", lora, "--temperature", "-1"], "temperature"),
        (["compare", lora, "--promts", "x"], "did you mean --prompts"),
        (["compare", lora, "--out", str(tmp_path / "file" / "below")], "is not a writable directory"),
    ]
    output = {
        "empty.json": "the file is empty",
        "none.json": "it holds no prompts",
        "broken.json": "not JSON",
        "object.json": "expected a list",
        "broken.jsonl": "line 2: not JSON",
        "number.json": "row 1: expected a text, or an object with an instruction, got int",
        "blank.json": "row 2: the prompt is empty",
        "column.json": "got columns 'prompt'",
        "null.json": "should hold text, got null",
        "list.json": "column 'input' should hold text, got list",
        "long.json": "prompt 2 has",
        "prompts.md": "cannot tell its format",
    }
    cases += [(["compare", lora, "--prompts", str(tmp_path / name)], message) for name, message in output.items()]
    before = sorted(compared_runs.rglob("*")), sorted(tmp_path.rglob("*"))
    for args, message in cases:
        assert main(args) == 2, args
        assert message in one_line(capsys), args
    assert (sorted(compared_runs.rglob("*")), sorted(tmp_path.rglob("*"))) == before


def other_run(lora: Path, folder: Path, **changes: object) -> str:
    """The run `lora` as if its recipe had been another."""
    shutil.copytree(lora / "adapter", folder / "adapter")
    (folder / "run.json").write_text(json.dumps(comparison_of(lora / "run.json") | changes))
    return str(folder)


def test_runs_whose_bases_read_other_tokens(compared_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lora = compared_runs / "lora-nano"
    short = tmp_path / "short"
    models.save(fgpt.init(replace(fgpt.load("nano").cfg, n_ctx=64), fgpt.key(0)), short, like="nano")
    assert main(["compare", str(lora), other_run(lora, tmp_path / "other", base=str(short))]) == 2
    assert "their tokens or contexts differ" in one_line(capsys)
    assert main(["compare", str(lora), other_run(lora, tmp_path / "hub", base="gpt2")]) == 2
    assert "gpt2" in one_line(capsys)
    assert not list(compared_runs.glob("compare-*"))[1:]


def test_runs_over_formats_of_one_base(compared_runs: Path, tmp_path: Path):
    lora, out = compared_runs / "lora-nano", tmp_path / "out"
    quantized = other_run(lora, tmp_path / "quantized", quantize="nf4")
    options = ["--num-prompts", "2", "--max-new-tokens", "3", "--out", str(out)]
    assert main(["compare", str(lora), quantized, *options]) == 0
    comparison = comparison_of(out / "compare.json")
    assert list(comparison["scores"]) == ["base", "lora-nano", "base of quantized", "quantized"]
    losses = [scores["held-out response loss (nats per token)"] for scores in comparison["scores"].values()]
    assert losses[1] < losses[0]
    assert losses[3] < losses[2]
    assert losses[2] != losses[0]  # the quantized base is another one
    assert losses[2] == pytest.approx(losses[0], abs=0.2)
    assert "The base of quantized: nano in float32 and nf4." in (out / "compare.md").read_text()


def test_a_run_without_held_out_rows(compared_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = ["--data", str(tmp_path / "rows.json"), "--num-heldout", "0", "--steps", "1", "--micro-batch-size", "1"]
    assert main(["train", "lora-nano", *options, "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "lora-nano")]) == 2
    assert "held out no rows: give prompts with --prompts FILE" in capsys.readouterr().err.splitlines()[-1]


def test_rows_that_another_run_may_have_seen(compared_runs: Path):
    run = run_dir.read_run(compared_runs / "lora-nano")
    first = replace(run, data=("rows.json",), seed=0, num_heldout=8)
    assert not compare_sides.may_have_seen(first, first)
    assert compare_sides.may_have_seen(replace(first, seed=1), first)
    assert compare_sides.may_have_seen(replace(first, num_heldout=4), first)
    assert not compare_sides.may_have_seen(replace(first, num_heldout=16), first)  # it held those out as well
    assert not compare_sides.may_have_seen(replace(run, seed=1), run)  # the embedded data has its own
