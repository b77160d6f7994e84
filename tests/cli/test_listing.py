"""`fgpt recipes` and `fgpt runs`; a second run of a name keeps the first."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from builders.runs import SHORT_TRAINING

import fgpt
from fgpt.cli import run_dir
from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.recipes import RECIPES


@pytest.mark.slow
def test_a_second_run_of_a_name_keeps_the_first(tmp_path: Path, instruction_file: Path):
    for _ in range(2):
        options = [
            *SHORT_TRAINING[:-4],
            "--compare-prompts",
            "0",
            "--data",
            str(instruction_file),
            "--num-heldout",
            "4",
        ]
        assert main(["train", "lora-nano", *options, "--out", str(tmp_path)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lora-nano", "lora-nano-2"]
    assert run_dir.find_finished("lora-nano", tmp_path).name == "lora-nano-2"
    first, second = (fgpt.load_peft(tmp_path / n / "adapter", fgpt.load("nano")) for n in ("lora-nano", "lora-nano-2"))
    for path in first:  # the same seed, the same adapter
        assert torch.equal(first[path].b, second[path].b)  # pyright: ignore[reportAttributeAccessIssue]


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES)


@pytest.mark.slow
def test_runs_are_listed_newest_first(lora_run: Path, capsys: pytest.CaptureFixture[str]):
    out = lora_run.parent
    for age, name, state in ((300, "mine", "running"), (600, "broken", "failed")):
        (out / name).mkdir()
        values = json.loads((lora_run / "run.json").read_text()) | {"name": name}
        (out / name / "run.json").write_text("[]" if name == "broken" else json.dumps(values))
        (out / name / "status.json").write_text(json.dumps({"state": state, "steps": 9}))
        (out / name / "metrics.jsonl").write_text('{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
        modified = lora_run.joinpath("run.json").stat().st_mtime - age
        os.utime(out / name / "run.json", (modified, modified))
    assert main(["runs", "--out", str(out)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    loss = f"{read_metrics(lora_run / 'metrics.jsonl')[-1]['loss']:.3f}"
    assert lines == [
        ["name", "recipe", "step", "loss", "state"],
        ["lora-nano", "lora-nano", "6/6", loss, "finished"],
        ["mine", "lora-nano", "2/9", "1.500", "killed"],  # no process has its lock
        ["broken", "damaged"],
    ]
    assert main(["runs", "--out", str(out / "none")]) == 0
    assert "no runs in" in capsys.readouterr().out
    for name in ("mine", "broken"):
        shutil.rmtree(out / name)
