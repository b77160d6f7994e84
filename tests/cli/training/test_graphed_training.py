"""Trainings whose steps are recorded as CUDA graphs, which a CPU imitates: the same lines, checkpoints and replays."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from builders.graphs import imitate
from builders.runs import copy_interrupted, one_line

from fgpt import losses
from fgpt.cli import devices
from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.training import build
from fgpt.kernels import linear
from fgpt.kernels.documents import Documents
from fgpt.step_graphs import StepGraphs

TIMED = ("seconds", "memory_gb", "mfu")


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[list[int]]:
    """A CPU that records; what is looked at on a CPU alone is not. The number of recordings."""
    recorded: list[int] = []

    def record(run: Any) -> Any:
        recorded.append(1)
        return imitate(run)

    monkeypatch.setattr(devices, "check_cuda_graphs", lambda device: None)
    monkeypatch.setattr(build, "StepGraphs", partial(StepGraphs, record=record))
    monkeypatch.setattr(linear, "can_reconstruct", lambda row: False)
    monkeypatch.setattr(Documents, "check", lambda self, tokens: None)
    monkeypatch.setattr(losses, "_check_distinct", lambda positions: None)
    yield recorded
    assert "without a CUDA graph" not in capsys.readouterr().err


def lines(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMED} for line in read_metrics(run / "metrics.jsonl")]


def final_state(run: Path) -> bytes:
    return sorted((run / "checkpoints").glob("*/state.safetensors"))[-1].read_bytes()


@pytest.mark.slow
def test_instruction_tuning(
    recordings: list[int], training_args: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With dropout, accumulation, a schedule and an evaluation: as steps that are not recorded, as a training that was
    interrupted, and as its replay.
    """
    args = [*training_args["instruct"], "--optimizer", "adamw", "--compare-prompts", "0", "--cuda-graphs"]
    args += ["--keep-checkpoints", "20"]
    assert main(["train", *args, "--out", str(tmp_path / "graphs")]) == 0
    assert 1 <= len(recordings) <= 4
    run = tmp_path / "graphs" / "lora-nano"
    copy_interrupted(run, tmp_path / "resumed" / "lora-nano", after=5)
    assert main(["train", "lora-nano", "--resume", "--out", str(tmp_path / "resumed")]) == 0
    assert main(["replay", str(run), "--step", "7"]) == 0
    monkeypatch.setattr(build, "StepGraphs", lambda step: step)
    assert main(["train", *args, "--out", str(tmp_path / "plain")]) == 0
    for other in ("resumed", "plain"):
        assert lines(tmp_path / other / "lora-nano") == lines(run)
        assert final_state(tmp_path / other / "lora-nano") == final_state(run)


def test_without_cuda(training_args: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", *training_args["instruct"], "--cuda-graphs", "--out", str(tmp_path)]) == 2
    assert one_line(capsys) == ("error: --cuda-graphs needs a CUDA device, and this training runs on cpu: leave it out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_preference_tuning(objective: str, recordings: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows: list[dict[str, Any]] = []
    for i in range(15):
        prompt, answer = f"Say {i}.", f"It is {i}." + " Yes." * (i % 4)
        judged = {"prompt": prompt, "completion": answer, "label": i % 3 > 0}
        rows.append(judged if objective == "kto" else {"prompt": prompt, "chosen": answer, "rejected": "No."})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = [
        f"{objective}-nano",
        "--base",
        "nano",
        "--data",
        str(tmp_path / "rows.jsonl"),
        "--steps",
        "4",
        "--cuda-graphs",
    ]
    args += [
        "--micro-batch-size",
        "2",
        "--grad-accumulation-steps",
        "2",
        "--num-heldout",
        "3",
        "--compare-prompts",
        "0",
    ]
    assert main(["train", *args, "--out", str(tmp_path / "graphs")]) == 0
    assert len(recordings) == 1
    monkeypatch.setattr(build, "StepGraphs", lambda step: step)
    assert main(["train", *args, "--out", str(tmp_path / "plain")]) == 0
    runs = [tmp_path / name / f"{objective}-nano" for name in ("plain", "graphs")]
    assert lines(runs[0]) == lines(runs[1])
    assert final_state(runs[0]) == final_state(runs[1])
