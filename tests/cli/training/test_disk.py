"""A full disk, a folder that turns read-only, two processes in one folder."""

import errno
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from builders.resume import assert_same_files, exit_status, final_files, resume, run_in, run_in_fork, wait_until

from fgpt.cli import run_dir
from fgpt.cli.main import main
from fgpt.errors import InputError


@pytest.mark.slow
def test_a_full_disk_ends_in_one_line_with_the_last_checkpoint_whole(
    training_args: Any, undisturbed_results: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """The kernel itself refuses a file above a size: first the metrics, then the checkpoints, outgrow it."""
    import resource

    def limit_file_size(size: int) -> Callable[[], None]:
        def limit() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        return limit

    args, (expected, _) = training_args["instruct"], undisturbed_results["instruct"]
    assert (
        exit_status(run_in_fork(["train", *args, "--out", str(tmp_path)], limit_file_size(2000))) == 2
    )  # the state is larger
    (run,) = run_in(tmp_path)
    assert not list((run / "checkpoints").rglob("manifest.json"))
    pid = run_in_fork(resume(run))
    wait_until(lambda: bool(list((run / "checkpoints").glob("step-00000[45]/manifest.json"))))
    os.kill(pid, signal.SIGKILL)
    exit_status(pid)
    size = (run / "metrics.jsonl").stat().st_size
    state = next((run / "checkpoints").rglob("state.safetensors")).stat().st_size
    assert exit_status(run_in_fork(resume(run), limit_file_size(max(state - 1, size + 10)))) == 2
    output = " ".join(capfd.readouterr().err.split())
    assert "File too large; free space" in output
    assert f"resume with: fgpt train {run} --resume" in output
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    assert exit_status(run_in_fork(resume(run))) == 0
    assert_same_files(final_files(tmp_path), expected)


@pytest.mark.slow
def test_a_folder_that_turns_read_only(
    training_args: Any, undisturbed_results: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """After some files no more can be made: the checkpoints that are there stay whole, and are gone on from."""
    args, (expected, _) = training_args["instruct"], undisturbed_results["instruct"]

    def spoil() -> None:
        make, left = tempfile.mkstemp, 12

        def refuse(*where: Any, **more: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return make(*where, **more)

        tempfile.mkstemp = refuse

    assert exit_status(run_in_fork(["train", *args, "--out", str(tmp_path)], spoil)) == 2
    output = " ".join(capfd.readouterr().err.split())
    assert "Read-only file system; free space, then resume with: fgpt train" in output
    (run,) = run_in(tmp_path)
    assert list((run / "checkpoints").rglob("manifest.json"))
    assert exit_status(run_in_fork(resume(run))) == 0
    assert_same_files(final_files(tmp_path), expected)


def test_a_folder_that_cannot_be_written_is_one_line(
    training_args: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Before anything is read."""
    file, locked = tmp_path / "file", tmp_path / "locked"
    file.write_text("")
    locked.mkdir(mode=0o500)
    for out, reason in [(file, f"{file} is a file"), (file / "runs", f"{file} is a file")]:
        assert main(["train", *training_args["instruct"], "--out", str(out)]) == 2
        assert (
            capsys.readouterr().err == f"error: cannot make {out}: {reason}; choose another place with --out FOLDER\n"
        )
    if not os.access(locked, os.W_OK):  # root may write anywhere
        with pytest.raises(InputError, match="locked may not be written to; choose another place with --out FOLDER"):
            run_dir.check_out(locked / "runs")
    run_dir.check_out(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_no_two_processes_train_in_one_folder(training_args: Any, undisturbed_results: Any, tmp_path: Path):
    """Two begun at once have folders of their own; one that runs cannot be taken up."""
    args, (expected, _) = training_args["instruct"], undisturbed_results["instruct"]
    pids = [run_in_fork(["train", *args, "--out", str(tmp_path)]) for _ in range(3)]
    wait_until(lambda: len(run_in(tmp_path)) == 3)
    assert exit_status(run_in_fork(resume(tmp_path / "lora-nano"))) == 2
    assert exit_status(run_in_fork(["train", str(tmp_path / "lora-nano-2"), "--resume"])) == 2
    assert [exit_status(pid) for pid in pids] == [0, 0, 0]
    for run in run_in(tmp_path):
        alone = tmp_path / "alone" / run.name
        shutil.copytree(run, alone / "lora-nano")
        assert_same_files(final_files(alone), expected)


def test_a_reader_never_sees_a_torn_file(training_args: Any, tmp_path: Path):
    """While a training writes as often as it can, another process reads all there is, over and over."""
    pid, reads = run_in_fork(["train", *training_args["instruct"], "--out", str(tmp_path)]), 0
    while not os.waitpid(pid, os.WNOHANG)[0]:
        for path in (Path(at) / name for run in run_in(tmp_path) for at, _, names in os.walk(run) for name in names):
            if any(part.startswith(".") for part in path.relative_to(tmp_path).parts):
                continue  # a name for what is not there yet
            try:
                data = path.read_bytes()
            except FileNotFoundError:  # of an old checkpoint, deleted meanwhile
                continue
            if path.suffix == ".json":
                json.loads(data)
            elif path.name == "metrics.jsonl":
                assert data == b"" or data.endswith(b"\n")
                assert all(json.loads(line)["step"] for line in data.splitlines())
            elif path.suffix == ".safetensors":
                safetensors.torch.load(data)
                reads += 1
    assert reads > 10
