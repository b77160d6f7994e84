"""What is not ours stays; links; a run that is renamed while it trains."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from builders.resume import assert_same_files, exit_status, final_files, resume, run_in_fork, wait_until

from fgpt.cli import run_dir
from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.errors import InputError


def unfinished_copy(trained: Path, at: Path) -> Path:
    run = shutil.copytree(trained, at / trained.name)
    (run / "status.json").write_text('{"state": "running", "steps": 12}\n')
    return run


def test_what_is_not_ours_stays(checkpointed_run: Path, tmp_path: Path, training_args: Any):
    """Names that a user gives, whatever they begin with; our own leavings go."""
    run = unfinished_copy(checkpointed_run, tmp_path / "runs")
    foreign = [".gitlab-ci.yml", ".env.local", ".run.json.old", ".a.b.c", ".x.abcdefgh.fgpt-partial.txt"]
    for at in (run, run / "adapter", run / "checkpoints"):
        for name in foreign:
            (at / name).write_text("mine")
        (at / ".run.json.ab12_xyz.fgpt-partial").write_text("ours, half written")
    folder_of_theirs = run / ".cache.d"
    folder_of_theirs.mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / ".x.ab12_xyz.fgpt-partial").write_text("mine")
    (run / ".y.ab12_xyz.fgpt-partial").symlink_to(outside)  # of our form: the link goes, and not what is behind it
    assert exit_status(run_in_fork(resume(run))) == 0
    for at in (run, run / "checkpoints"):
        assert [name for name in foreign if not (at / name).exists()] == []
        assert not (at / ".run.json.ab12_xyz.fgpt-partial").exists()
    assert folder_of_theirs.is_dir()
    assert [p.name for p in outside.iterdir()] == [".x.ab12_xyz.fgpt-partial"]


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "tensorboard", ".lock"])
def test_nothing_is_written_through_a_link(
    name: str, checkpointed_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], training_args: Any
):
    run, outside = unfinished_copy(checkpointed_run, tmp_path / "runs"), tmp_path / "outside"
    if name == ".lock":
        (run / name).write_text("mine")
    (run / name).rename(outside)
    (run / name).symlink_to(outside)
    files = [outside] if outside.is_file() else [p for p in outside.rglob("*") if p.is_file()]
    before = {p: p.read_bytes() for p in files}
    assert main(resume(run)) == 2
    output = " ".join(capsys.readouterr().err.split())
    assert f"{name} is a symbolic link, which fgpt does not write through" in output
    assert before == {p: p.read_bytes() for p in before}


def test_an_adapter_behind_a_link_is_replaced_and_not_emptied(
    checkpointed_run: Path, tmp_path: Path, training_args: Any
):
    run, outside = unfinished_copy(checkpointed_run, tmp_path / "runs"), tmp_path / "outside"
    (run / "adapter").rename(outside)
    (outside / "thesis.txt").write_text("mine")
    before = {p: p.read_bytes() for p in outside.iterdir()}
    (run / "adapter").symlink_to(outside)
    assert exit_status(run_in_fork(resume(run))) == 0
    assert before == {p: p.read_bytes() for p in outside.iterdir()}
    assert (run / "adapter").is_dir()
    assert not (run / "adapter").is_symlink()


@pytest.mark.slow
def test_a_run_that_is_renamed_while_it_trains(
    training_args: Any, undisturbed_results: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """One line; nothing of it under the old name; under the new one it is gone on with."""
    args, (expected, _) = training_args["instruct"], undisturbed_results["instruct"]
    pid, run, moved = run_in_fork(["train", *args, "--out", str(tmp_path)]), tmp_path / "lora-nano", tmp_path / "mine"
    wait_until(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") >= 2)
    run.rename(moved)
    assert exit_status(pid) == 2
    assert "was renamed or deleted while it was in use" in " ".join(capfd.readouterr().err.split())
    assert not run.exists()
    assert exit_status(run_in_fork(["train", str(moved), "--resume"])) == 0
    assert_same_files(final_files(tmp_path), expected)


@pytest.mark.parametrize(
    "name", ["../../x", "/abs/x", "a/b", "a\\b", ".", "..", ".x", "-x", "", "a\nb", "a\x1bb", "x" * 300]
)
def test_a_name_is_that_of_one_folder(
    name: str, training_args: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "a" / "b" / "runs"
    assert main(["train", *training_args["instruct"], f"--name={name}", "--out", str(out)]) == 2
    (output,) = capsys.readouterr().err.strip().splitlines()
    assert "expected the name of one folder" in output
    assert list(tmp_path.iterdir()) == []


def test_what_is_shared_names_no_place_and_nobody(checkpointed_run: Path, training_args: Any, tmp_path: Path):
    """All that a run leaves, but the file of full paths and what PEFT's config says of the base."""
    import socket

    run = shutil.copytree(checkpointed_run, tmp_path / checkpointed_run.name)
    assert main(["report", str(run)]) == 0
    base = training_args["instruct"][training_args["instruct"].index("--base") + 1]
    for path in (p for p in run.rglob("*") if p.is_file()):
        assert socket.gethostname() not in path.name
        if path.name not in ("local.json", "adapter_config.json"):
            data = path.read_bytes()
            for place in (base, str(tmp_path), str(checkpointed_run.parent), str(Path.home()) + "/"):
                assert place.encode() not in data, (path, place)
    assert json.loads((run / "run.json").read_text())["base"] == ".../base"
    assert run_dir.instruction_run(run).base == base


@pytest.mark.parametrize(
    "line",
    ["[1, 2]", "7", "null", '"text"', '{"step": "3", "loss": 1.0}', '{"step": 3.0, "loss": 1.0}', '{"step": true}']
    + ['{"step": 3}', '{"step": 3, "loss": "1.0"}', '{"step": 3, "loss": NaN}', '{"step": -1, "loss": 1.0}']
    + ['{"step": 3, "loss": 1.0, "tokens": [1]}', '{"step": 3, "loss": 1.0, "lr": {}}', "[" * 99_999],
)
def test_a_line_of_wrong_types_is_named(line: str, tmp_path: Path):
    good = '{"step": 1, "loss": 2.0, "tokens": 3, "seconds": 1.0, "heldout_loss": NaN}'
    (tmp_path / "metrics.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(InputError, match="line 2 is damaged"):
        read_metrics(tmp_path / "metrics.jsonl")
