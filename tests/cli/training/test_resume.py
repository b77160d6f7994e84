"""Asked to end, a training leaves a checkpoint and goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders import ROOT
from builders.resume import assert_same_files, exit_status, final_files, resume, run_in_fork, wait_until

from fgpt.cli import run_dir
from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.run_json import write_run
from fgpt.errors import InputError
from fgpt.io.files import atomic_dir, write_json
from fgpt.recipes import RECIPES

# -------------------------------------------------------------------------------------------------- how it may end


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_end_it_leaves_a_checkpoint_and_goes_on(
    number: int, training_args: Any, undisturbed_results: Any, tmp_path: Path
):
    """A process of its own, as a user has it."""
    args, (expected, _) = training_args["instruct"], undisturbed_results["instruct"]
    command = [sys.executable, "-m", "fgpt", "train", *args, "--checkpoint-every-minutes", "99", "--out", str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = tmp_path / "lora-nano" / "metrics.jsonl"
    wait_until(lambda: process.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") >= 2))
    process.send_signal(number)
    _, output = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "resume with: fgpt train" in " ".join(output.split())
    run = tmp_path / "lora-nano"
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
    steps = [line["step"] for line in read_metrics(metrics)]
    assert steps[-1] < 12
    assert (run / "checkpoints" / f"step-{steps[-1]:06d}" / "manifest.json").is_file()
    assert exit_status(run_in_fork(resume(run, "--checkpoint-every-minutes", "0"))) == 0
    assert_same_files(final_files(tmp_path), expected)


def test_a_leaf_that_never_moves_is_an_error(training_args: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """At a rate below what fp32 shows of numbers near 1 no norm's gain moves: nothing would be trained, in silence."""
    args = [
        *training_args["instruct"][:3],
        *training_args["instruct"][3:],
        "--adapter.kind",
        "ln",
        "--adapter.target",
        r".*ln_.*\.w",
    ]
    args = [*args, "--adapter.dropout", "0", "--optimizer", "adamw", "--lr", "1e-9", "--out", str(tmp_path)]
    assert main(["train", *args]) == 2
    output = " ".join(capsys.readouterr().err.split())
    assert "3 of 3 trained leaves did not change in two steps (blocks.0.ln_1.w, blocks.0.ln_2.w, ln_f.w)" in output


def test_a_line_that_was_cut_off_does_no_harm(checkpointed_run: Path, tmp_path: Path):
    whole_file = (checkpointed_run / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole_file + whole_file[:40])
    assert read_metrics(tmp_path / "metrics.jsonl") == read_metrics(checkpointed_run / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text("{no\n" + whole_file)
    with pytest.raises(InputError, match="line 1 is damaged"):
        read_metrics(tmp_path / "metrics.jsonl")


# --------------------------------------------------------------------------------------------------- what it rests on


def half_written(path: Path) -> None:
    with atomic_dir(path) as at:
        (at / "x").write_text("2")
        raise OSError(28, "No space left on device")


def test_a_folder_is_replaced_whole_or_stays(tmp_path: Path):
    with atomic_dir(tmp_path / "a") as at:
        (at / "x").write_text("1")
    with pytest.raises(InputError, match="free space"):
        half_written(tmp_path / "a")
    assert (tmp_path / "a" / "x").read_text() == "1"
    with atomic_dir(tmp_path / "a") as at:
        (at / "y").write_text("2")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["y"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "name", ["lora-nano", "qlora-nano", "emotion-small", "rte-smollm2", "pretrain-nano", "dolly-finqa-lora"]
)
def test_a_run_reads_back_as_it_was(name: str, tmp_path: Path):
    run = RECIPES[name]()
    write_run(tmp_path, run)
    assert run_dir.read_run(tmp_path) == run
    values = json.loads((tmp_path / "run.json").read_text())
    for field in ("name", "seed", "out", "lr"):
        write_json(tmp_path / "run.json", values | {field: [1]})
        with pytest.raises(InputError, match=field):
            run_dir.read_run(tmp_path)
    write_json(tmp_path / "run.json", {k: v for k, v in values.items() if k != "seed"})
    assert run_dir.read_run(tmp_path) == run  # what is absent takes its default
