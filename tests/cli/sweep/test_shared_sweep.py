"""A sweep by two and three processes is that by one: the same bits from the same groups, and one that was interrupted
goes on with another number of processes.
"""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from builders import same
from builders.command_line import training_options
from builders.torchrun import launch_together, run_together
from safetensors.torch import load_file

from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics

SWEPT = ["--lr", "1e-3", "3e-3", "1e-2", "--seed", "0", "1", "--compare-prompts", "0", "--warmup-steps", "2"]


def adapters(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.parent.parent.name: load_file(path) for path in folder.glob("*/adapter/adapter_model.safetensors")}


def check_equal(folder: Path, whole: Path) -> None:
    """Also what says how each member ended, and every line of metrics but for times."""
    members, expected = (json.loads((x / "sweep.json").read_text())["members"] for x in (folder, whole))
    assert members == expected
    assert len(adapters(folder)) == 6
    assert same(adapters(folder), adapters(whole))
    for entry in members:
        lines, others = (read_metrics(x / entry["name"] / "metrics.jsonl") for x in (folder, whole))
        names = ("step", "loss", "grad_norm", "lr", "tokens", "heldout_loss")
        assert [[line.get(x) for x in names] for line in lines] == [[line.get(x) for x in names] for line in others]


def sweep(count: int, size: int, out: Path, *options: str) -> Path:
    """The folder of a sweep by so many processes, of which one prints; each trains so many members at once."""
    if count == 1:
        assert main(["sweep", *options, "--out", str(out)]) == 0
    else:
        done = run_together(count, "-m", "fgpt", "sweep", *options, "--out", str(out))
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count("the best is ") == 1
        assert f"6 members, {size} at once in each of {count} processes" in " ".join(done.stderr.split())
    assert (out / "lora-nano-sweep" / "report.html").is_file()
    return out / "lora-nano-sweep"


@pytest.mark.slow
def test_equal_groups_have_equal_bits(project: Path, tmp_path: Path):
    """Members that are stopped go from one rank to another."""
    options = [*training_options(project), *SWEPT, "--steps", "6", "--eval-every", "2", "--pruner", "halving"]
    folders = [sweep(count, 2, tmp_path / str(count), *options, "--group-size", "2") for count in (1, 3)]
    check_equal(*folders[::-1])
    states = [x["state"] for x in json.loads((folders[1] / "sweep.json").read_text())["members"]]
    assert sorted(states) == ["finished"] + 5 * ["stopped"]


@pytest.mark.slow
def test_what_fits_into_memory_is_shared(project: Path, tmp_path: Path):
    """Six members that fit into one process are two groups of three: equal to rounding."""
    options = [*training_options(project), *SWEPT, "--steps", "6", "--pruner", "median", "--min-steps", "2"]
    folders = [sweep(count, 3, tmp_path / str(count), *options) for count in (1, 2)]
    whole, shared = (json.loads((folder / "sweep.json").read_text()) for folder in folders)
    assert whole["fitting"] == shared["fitting"] == 6
    assert [x["state"] for x in shared["members"]] == [x["state"] for x in whole["members"]]
    assert "stopped" in [x["state"] for x in whole["members"]]
    for name in ("loss", "heldout_loss"):
        expected = [x[name] for x in whole["members"]]
        assert [x[name] for x in shared["members"]] == pytest.approx(expected, rel=1e-5), name


@pytest.mark.slow
def test_an_interrupted_one_goes_on_with_other_processes(project: Path, tmp_path: Path):
    options = [*training_options(project), *SWEPT, "--steps", "80", "--group-size", "2"]
    assert main(["sweep", *options, "--out", str(tmp_path / "whole")]) == 0
    process = launch_together(2, "-m", "fgpt", "sweep", *options, "--out", str(tmp_path / "parts"))
    folder = tmp_path / "parts" / "lora-nano-sweep"
    late = folder / "lr-3e-3-seed-0" / "metrics.jsonl"  # of the second group, which rank 1 trains
    until = time.monotonic() + 60
    while not late.is_file() or len(read_metrics(late)) < 10:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    error = end(process)
    assert error.count("interrupted; resume with: fgpt sweep ") == 1, error
    steps = {x["name"]: x["steps"] for x in json.loads((folder / "sweep.json").read_text())["members"]}
    assert 10 <= steps["lr-3e-3-seed-0"] < 80
    assert steps["lr-1e-3-seed-0"] > 0
    done = run_together(3, "-m", "fgpt", "sweep", str(folder), "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    check_equal(folder, tmp_path / "whole" / "lora-nano-sweep")


def end(process: "subprocess.Popen[str]") -> str:
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    return error
