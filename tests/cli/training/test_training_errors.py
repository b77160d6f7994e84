"""A training that cannot begin or go on ends in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from builders import ROOT
from builders.runs import SHORT_TRAINING, one_line

import fgpt
from fgpt.cli.main import main

# ---------------------------------------------------------------------------------------------------- what it leaves


@pytest.mark.slow
def test_ctrl_c_leaves_a_usable_adapter(tmp_path: Path):
    command = [sys.executable, "-m", "fgpt", "train", "lora-nano", "--epochs", "100", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = tmp_path / "lora-nano" / "metrics.jsonl"
    try:
        for _ in range(600):
            if metrics.exists() and metrics.read_text().count("\n") >= 3:
                break
            time.sleep(0.2)
        os.kill(process.pid, signal.SIGINT)
        _, output = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "interrupted" in output
    assert "Traceback" not in output
    adapters = fgpt.load_peft(tmp_path / "lora-nano" / "adapter", fgpt.load("nano"))
    assert all(bool(x.b.any()) for x in adapters.values())  # pyright: ignore[reportAttributeAccessIssue]


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian", "lora-nano"], "expected one of train"),
        (["train"], "expected a recipe"),
        (["train", "lora-nanno"], "did you mean lora-nano"),
        (["train", "lora-nano", "--lrr", "1"], "no option --lrr; did you mean --lr"),
        (["train", "lora-nano", "--lr", "fast"], "fast"),
        (["train", "lora-nano", "--steps", "4", "--epochs=2"], "--steps 4 and --epochs 2 both say how long to train"),
        (["train", "lora-nano", "--num-heldout", "5"], "--data nano has held-out rows: leave it out"),
        (["train", "lora-nano", "--template", "chta"], "no template named 'chta'; there are alpaca, plain, chat"),
        (["train", "lora-nano", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["train", "lora-nano", "--data", "missing.json"], "missing.json: no such file"),
        (["train", "lora-nano", "--base", "./missing"], "no such model folder"),
        (["train", "lora-nano", "--adapter.rank", "300"], "expected 1 to 256"),
        (["train", "lora-nano", "--adapter.target", r"blocks\.\d+\.atn\.q"], "matches no path; nearest are"),
        (["train", "lora-nano", "--adapter.target", "("], "not a regular expression"),
        (["train", "lora-nano", "--max-seq-len", "20"], "tokens, the limit is 20"),
        (["generate", "lora-nano", "hi", "--max-new-tokens", "x"], "x"),
        (["generate", "nothing", "hi"], "no trained run 'nothing'"),
        (["compare", "nothing"], "no trained run 'nothing'"),
        (["merge", "nothing"], "no trained run 'nothing'"),
        (["merge", "nothing", "--merge-base", "both"], "both"),
        (["train", "lora-nano", "--quantize", "nf5"], "nf5"),
        (["train", "full-nano", "--quantize", "nf4"], "which is quantized"),
        (["train", "lora-nano", "--adapter.dropout", "1"], "--adapter.dropout is 1.0: expected 0 or more, below 1"),
        (["train", "ia3-nano", "--adapter.target", "wte"], "IA3 on wte: expected a linear layer"),
    ],
)
def test_bad_input_is_one_line(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    assert message in one_line(capsys)
    assert list(tmp_path.iterdir()) == []  # nothing half-made


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error, after a line for the format of each source."""
    *lines, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ")
    assert len(lines) == 1, lines
    return error


def test_bad_columns_and_rows(tmp_path: Path, instruction_file: Path, capsys: pytest.CaptureFixture[str]):
    out = ["--out", str(tmp_path / "runs")]
    assert main(["train", "lora-nano", "--data", str(instruction_file), "--columns.output", "answer", *out]) == 2
    assert "no column 'answer'; there are 'instruction', 'input', 'output'" in one_line(capsys)
    single = tmp_path / "single.json"
    single.write_text(json.dumps([{"instruction": "Say one.", "output": "one"}]))
    assert main(["train", "lora-nano", "--data", str(single), *out]) == 2
    assert "single.json has 1 rows: expected 2 or more, one of them to be held out" in last_line(capsys)
    silent = tmp_path / "silent.json"
    silent.write_text(json.dumps([{"instruction": "Say nothing.", "output": ""}] * 9))
    assert main(["train", "lora-nano", "--data", str(silent), "--num-heldout", "2", *out]) == 2
    assert "silent.json, row 1 has no response" in last_line(capsys)
    assert not (tmp_path / "runs").exists()


def test_nan_ends_with_one_line_and_no_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    args = ["train", "lora-nano", "--lr", "1e30", "--warmup-steps", "0", *SHORT_TRAINING, "--out", str(tmp_path)]
    assert main(args) == 2
    output = capsys.readouterr().err.strip().splitlines()[-1]
    assert output.startswith("error: the loss became")
    assert "lower --lr" in output
    left = {p.name for p in (tmp_path / "lora-nano").iterdir()}
    assert left == {"run.json", "status.json", "environment.json", ".lock", "metrics.jsonl", "tensorboard"}


def test_a_tokenizer_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tmp_path / "model"
    fgpt.save(fgpt.init(fgpt.Config(1, 1, 8, 64, 1000, 32), fgpt.key(0)), model, like="nano")
    assert main(["train", "lora-nano", "--base", str(model), "--out", str(tmp_path / "runs")]) == 2
    assert "the vocabulary does not fit the model" in one_line(capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/shm").exists(), reason="mounting a full disk needs root")
def test_a_full_disk(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        command = [sys.executable, "-m", "fgpt", "train", "lora-nano", *SHORT_TRAINING, "--out", str(disk)]
        done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert "No space left on device" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert not list(disk.rglob("*.safetensors"))
        assert [p.name for p in disk.rglob(".*")] == [".lock"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_the_hub_away_says_so_at_once(tmp_path: Path):
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    for recipe, data, thing in (
        ("lora-nano", "alpaca", "alpaca"),
        ("lora-medium", str(tmp_path / "rows.json"), "gpt2-medium"),
    ):
        rows = [{"instruction": "a", "output": "b"}] * 80
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        command = [sys.executable, "-m", "fgpt", "train", recipe, "--data", data]
        command += ["--out", str(tmp_path / "out")]
        done = subprocess.run(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
        assert done.returncode == 2
        lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("held out")]
        assert len(lines) <= 2, lines
        assert thing in lines[0]
        assert "lora-nano" in lines[-1]
        assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------- the state that is left


@pytest.mark.parametrize(
    ("lr", "message"), [("1e38", "after step 1, the loss is"), ("1e40", "are not finite: nothing is saved")]
)
def test_a_state_that_is_not_finite_is_not_saved(
    lr: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The last update comes after the last loss of the log."""
    args = ["lora-nano", "--steps", "1", "--compare-prompts", "0", "--out", str(tmp_path)]
    assert main(["train", *args, "--lr", lr]) == 2
    output = " ".join(capsys.readouterr().err.split())
    assert message in output
    assert not (tmp_path / "lora-nano" / "adapter").exists()
    assert json.loads((tmp_path / "lora-nano" / "status.json").read_text())["state"] == "failed"
    assert main(["train", "lora-nano", "--resume", "--out", str(tmp_path)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_state_that_is_worse_than_a_guess_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    args = ["lora-nano", "--steps", "1", "--compare-prompts", "0", "--out", str(tmp_path)]
    assert main(["train", *args, "--lr", "1e9"]) == 0
    assert "above the 8.32 of a uniform guess: the training diverged" in " ".join(capsys.readouterr().err.split())
