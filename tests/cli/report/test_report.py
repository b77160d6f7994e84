"""The report of a whole run, of one that only began, of one that is at work."""

import dataclasses
import json
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders.reports import LORA, report_of, section_of, write_run_dir
from filelock import FileLock

from fgpt import recipes
from fgpt.cli import config_diff
from fgpt.cli.options import parse
from fgpt.cli.report import run_data

RTE: Any = recipes.find("rte-smollm2")
SECTIONS = ["training", "comparison", "evaluation", "config", "environment", "reproduce"]


def test_a_whole_run(finished_run: Path):
    text = report_of(finished_run)
    assert re.findall(r'<section id="(\w+)"', text) == SECTIONS
    assert "60 of 60 steps" in text
    assert ">finished<" in text
    drawn = section_of(text, "training")
    for title in ("loss", "learning rate", "gradient norm", "tokens per second", "memory"):
        assert f"<b>{title}</b>" in drawn
    assert drawn.count('<svg role="img"') == 5
    assert ">held-out, best 0.03333 at step 60</span>" in drawn
    assert "last; best 0.033 at step 60" in drawn
    assert drawn.count('<th scope="row" class="number" data-value="') == 6  # evaluations
    assert "<b>200</b>" in drawn  # tokens per second
    samples = section_of(text, "comparison")
    assert samples.count("<article") == 25  # 10 prompts of two sides, and 5 references
    assert "2 more prompts" in samples
    assert samples.count('<p class="input">to &amp; fro</p>') == 9
    assert samples.count('<p class="text">It is.</p>') == 5
    assert '<td class="number best">20.00 <span class="note">± 4.50</span></td>' in samples
    assert "80 % repeated" in samples
    assert "response loss (nats per token)" in section_of(text, "evaluation")
    assert "AMD" in section_of(text, "environment") or "cpu" in section_of(text, "environment")
    assert "--resume" not in text
    assert not [p for p in finished_run.iterdir() if p.name.startswith(".report")]


def test_options_that_differ_are_marked(finished_run: Path):
    shown = section_of(report_of(finished_run), "config")
    assert "2 options differ from the recipe lora-nano" in shown
    assert re.findall(r'<tr><th scope="row" class="changed">([\w.-]+)</th>', shown) == ["lr", "data"]
    assert '<td class="changed">0.006</td>' in shown  # the named run's


CHANGED = [
    replace(LORA, out=Path("a b"), seed=3, adapter=replace(LORA.adapter, rank=4, target=r"blocks\..*\.(q|k)")),
    replace(LORA, lr=None, remat=True, steps=7),
    replace(recipes.find("emotion-smollm2"), labels=("a=b c", "d=e"), tune_also="-x", prompt=RTE.prompt),
    replace(recipes.find("tinytiny-pretrain"), data=(Path("x y.txt"), Path("z.txt")), betas=(0.5, 0.75), biases=True),
]


@pytest.mark.parametrize("run", CHANGED, ids=lambda run: run.name)
def test_the_command_makes_the_run_again(run: Any):
    values = json.loads(json.dumps(dataclasses.asdict(run), default=os.fspath))
    program, train, name, *rest = shlex.split(config_diff.command(values))
    assert (program, train, name) == ("fgpt", "train", run.name)
    assert parse(type(run), rest, recipes.find(name), "fgpt train") == run


def test_a_run_that_has_only_begun(tmp_path: Path):
    at = write_run_dir(tmp_path / "lora-nano", steps=0)
    text = report_of(at)
    assert re.findall(r'<section id="(\w+)"', text) == SECTIONS
    assert "No step was written" in section_of(text, "training")
    assert "fgpt compare .../lora-nano" in section_of(text, "comparison")
    assert "fgpt eval run .../lora-nano" in section_of(text, "evaluation")
    assert "fgpt train lora-nano" in section_of(text, "environment")
    assert "end not recorded" in text


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ({"state": "interrupted", "steps": 90}, "interrupted"),
        ({"state": "failed", "steps": 90, "why": "the disk is full"}, "failed"),
        ({"state": "running", "steps": 90}, "killed"),
    ],
)
def test_a_run_that_ended_early(tmp_path: Path, status: dict[str, Any], message: str):
    at = write_run_dir(tmp_path / "lora-nano", status=status)
    (at / ".lock").touch()
    text = report_of(at)
    assert f">{message}</span>" in text
    assert "60 of 90 steps" in text
    assert status.get("why", "") in text
    assert "fgpt train .../lora-nano --resume" in section_of(text, "reproduce")


def test_a_run_that_is_at_work(tmp_path: Path):
    at = write_run_dir(tmp_path / "lora-nano", status={"state": "running", "steps": 90})
    with FileLock(at / ".lock", is_singleton=False):
        assert ">running</span>" in report_of(at)


def test_a_lock_that_is_a_link_is_left_alone(tmp_path: Path):
    at = write_run_dir(tmp_path / "lora-nano", status={"state": "running", "steps": 90})
    (tmp_path / "thesis.txt").write_text("mine")
    (at / ".lock").symlink_to(tmp_path / "thesis.txt")
    assert ">killed</span>" in report_of(at)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_torn_line_and_repeated_steps(tmp_path: Path):
    at = write_run_dir(tmp_path / "lora-nano", steps=20)
    with (at / "metrics.jsonl").open("a") as file:
        for i in (15, 16):
            file.write(json.dumps({"step": i, "loss": 99.0}) + "\n")
        file.write('{"step": 17, "lo')
    data = run_data.read(at)
    assert (data.truncated_lines, data.repeated_steps) == (1, 2)
    assert [line["step"] for line in data.lines] == list(range(1, 21))
    assert [line["loss"] for line in data.lines[14:16]] == [99.0, 99.0]
    drawn = section_of(report_of(at), "training")
    assert "is incomplete" in drawn
    assert "2 lines are of steps repeated after resuming" in drawn
