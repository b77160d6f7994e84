"""A training that is killed at any moment goes on to the same end, bit for bit."""

import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401  imported here, once, and not in every process that is forked
import pytest
import rouge_score.rouge_scorer  # noqa: F401
import safetensors.torch
import sklearn.metrics  # noqa: F401
import torch
import torch.utils.tensorboard
from builders import ROOT

import fgpt
import fgpt.cli.evaluation.compare
import fgpt.cli.training.classification
import fgpt.cli.training.instruction_tuning
import fgpt.cli.training.pretraining
from fgpt.cli import run_dir
from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.run_json import write_run
from fgpt.cli.training import checkpoints
from fgpt.cli.training.job import content_hash
from fgpt.errors import InputError
from fgpt.io import models
from fgpt.io.files import atomic_dir, write_json
from fgpt.kernels import bitsandbytes_ops
from fgpt.recipes import RECIPES
from fgpt.tree import leaves, replace_at

bitsandbytes_ops.register()  # bitsandbytes too is imported here, once

KILLS = 50


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The arguments of a small training of each kind, dropout, accumulation and 8-bit moments among them."""
    at = tmp_path_factory.mktemp("given")
    cfg = dataclasses.replace(fgpt.load("nano").cfg, n_layer=1, n_head=2, d_model=32, d_mlp=64, n_ctx=96)
    models.save(fgpt.init(cfg, fgpt.key(0)), at / "base", like="nano")
    rows = [{"instruction": f"Say {i}.", "output": f"The number is {i}. " * (1 + i % 3)} for i in range(30)]
    (at / "rows.json").write_text(json.dumps(rows))
    texts = [
        f"{('I am so glad', 'I am so sad', 'I fear it')[i % 3]} {i};{('joy', 'woe', 'fear')[i % 3]}" for i in range(40)
    ]
    (at / "texts.txt").write_text("\n".join(texts))
    (at / "tales.txt").write_text(
        "\n<|endoftext|>\n".join(f"Once there was a fox. It ran {i} miles." * 3 for i in range(12))
    )
    often = ["--checkpoint-every-minutes", "0", "--seed", "3"]
    base = [
        "--base",
        str(at / "base"),
        "--micro-batch-size",
        "1",
        "--grad-accumulation-steps",
        "2",
        "--max-seq-len",
        "64",
        *often,
    ]
    lora = ["--adapter.rank", "4", "--adapter.dropout", "0.2", "--adapter.target", r"blocks.*\.(q|up)|wte"]
    asked = ["--data", str(at / "rows.json"), "--num-heldout", "4", "--compare-prompts", "2", "--max-new-tokens", "4"]
    best = ["--steps", "12", "--eval-every", "5", "--keep-best"]
    texts = ["--train", str(at / "texts.txt"), "--test", "None", "--num-heldout", "9", "--steps", "8"]
    tales = ["--data", str(at / "tales.txt"), "--tokenizer", "nano", "--no-compile", "--peak-tflops", "0.05"]
    size = ["--vocab", "4096", "--n-layer", "1", "--n-head", "2", "--d-model", "32", "--max-seq-len", "32"]
    steps = ["--micro-batch-size", "2", "--grad-accumulation-steps", "2", "--steps", "9", "--eval-every", "4"]
    timed = [
        "--checkpoint-every-minutes",
        "0.004",
        "--keep-checkpoints",
        "1",
        "--eval-every",
        "3",
    ]  # minutes: some steps have one, others none
    instruct = ["lora-nano", *base, "--optimizer", "adamw8bit", *lora, *asked, *best]
    return {
        "timed": [*instruct, *timed],
        "instruct": instruct,
        "classify": ["emotion-small", *base, *texts],
        "pretrain": ["tinytiny-pretrain", *tales, *size, *steps, *often],
    }


def forked(args: Sequence[str], spoil: Callable[[], Any] = lambda: None) -> int:
    """Run the command line in a process of its own, with what is imported already; its number."""
    if pid := os.fork():
        return pid
    code = 70
    try:
        torch.set_num_threads(1)  # no pool of threads outlives a fork
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        spoil()
        code = main(args)
    except Exception:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int:
    """The exit status of a process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def until(holds: Callable[[], bool]) -> None:
    for _ in range(20_000):
        if holds():
            return
        time.sleep(0.005)
    raise AssertionError("it did not come to that in 100 s")


def run_in(out: Path) -> list[Path]:
    """The folders of runs that were begun."""
    return [path.parent for path in out.glob("*/run.json")]


def finished(out: Path) -> bool:
    return any(json.loads((run / "status.json").read_text())["state"] == "finished" for run in run_in(out))


def next_try(args: list[str], out: Path) -> list[str]:
    if not run_in(out):  # it had not come so far as to be a run
        shutil.rmtree(out, ignore_errors=True)
        return ["train", *args, "--out", str(out)]
    return ["train", args[0], "--resume", "--out", str(out)]


FILES = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "adapters.safetensors",
    "model.safetensors",
    "compare.json",
)


def end_of(out: Path, by_clock: bool = False) -> dict[str, Any]:
    """All that a training comes to, to the bit; its timings left out. Of one whose checkpoints lie wherever
    the clock wanted them, the last and the best are compared.
    """
    (run,) = run_in(out)
    timed = ("seconds", "memory_gb", "mfu")
    lines = [{name: x for name, x in line.items() if name not in timed} for line in read_metrics(run / "metrics.jsonl")]
    last = sorted((run / "checkpoints").glob("*"))[-1]
    files = [p for p in run.rglob("*") if p.name in (*FILES, "state.safetensors", "manifest.json") and p.is_file()]
    if by_clock:
        compared = {last, checkpoints.best(run)}
        files = [p for p in files if p.parent.parent.name != "checkpoints" or p.parent in compared]
        assert len(list((run / "checkpoints").iterdir())) <= 2
    assert last.name == f"step-{lines[-1]['step']:06d}"
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert not [p for p in run.rglob(".*") if p.name != ".lock"], "what was half written stays behind"
    return {"lines": lines, **{str(p.relative_to(run)): p.read_bytes() for p in files}}


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name


@pytest.fixture(scope="module")
def whole(
    given: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, Any], float]]:
    """Of each kind, what the training that nobody disturbs comes to, and how many seconds it takes."""
    found = {}
    for kind, args in given.items():
        out, began = tmp_path_factory.mktemp("whole") / kind, time.perf_counter()
        assert ended(forked(["train", *args, "--out", str(out)])) == 0
        found[kind] = end_of(out, kind == "timed"), time.perf_counter() - began
    return found


@pytest.mark.slow
def test_killed_at_random_moments(given: Any, whole: Any, tmp_path: Path):
    """50 kills, and in the end the same, without one run lost."""
    chance, kills, ends = random.Random(0), 0, 0
    while kills < KILLS:
        kind = ("timed", "instruct", "classify", "timed", "pretrain")[ends % 5]
        args, (expected, seconds), out = given[kind], whole[kind], tmp_path / str(ends)
        while True:
            pid = forked(next_try(args, out))
            time.sleep(chance.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
            if (status := ended(pid)) == 0 or finished(out):
                break  # or killed on its way out, when all was done
            assert status == -signal.SIGKILL, f"{kind} ended with {status} after {kills} kills"
            kills += 1
        same(end_of(out, kind == "timed"), expected)
        ends += 1


CALLS = ("replace", "rename", "fsync", "unlink", "rmdir")


@pytest.mark.slow
@pytest.mark.parametrize(
    "often", [["--eval-every", "2"], ["--eval-every", "1", "--checkpoint-every-minutes", "99"]], ids=["each", "best"]
)
def test_killed_at_every_moment_of_writing(often: list[str], given: Any, tmp_path: Path):
    """Before each rename, flush and deletion, wherever it stands in a training of four steps, whose last deletes a
    checkpoint: with a checkpoint after each, and with those alone whose held-out loss is the best so far.
    """
    short = [*given["instruct"], "--steps", "4", "--keep-checkpoints", "1", "--compare-prompts", "0", *often]
    assert ended(forked(["train", *short, "--out", str(tmp_path / "whole")])) == 0
    expected, at = end_of(tmp_path / "whole"), 0

    def kill_at(number: int) -> None:
        left = number

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def instead(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return call(*args, **kwargs)

            return instead

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))

    while True:
        out = tmp_path / str(at)
        status = ended(forked(["train", *short, "--out", str(out)], lambda at=at: kill_at(at)))
        if status == 0:
            break  # it writes less often than that
        assert status == -signal.SIGKILL
        assert finished(out) or ended(forked(next_try(short, out))) == 0
        same(end_of(out), expected)
        at += 1
    assert at > 30


# ------------------------------------------------------------------------------------------------- a step once more


@pytest.fixture(scope="module")
def trained(given: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    assert ended(forked(["train", *given["instruct"], "--keep-checkpoints", "4", "--out", str(out)])) == 0
    (run,) = run_in(out)
    return run


def again(run: Path, *args: str) -> list[str]:
    return ["train", run.name, "--out", str(run.parent), "--resume", *args]


def test_any_step_comes_out_as_it_was(trained: Path, capsys: pytest.CaptureFixture[str]):
    """From the start, from a checkpoint just before it, and after the last; its rows are shown."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for step in (1, 4, 11, 12):
            assert main(["replay", str(trained), "--step", str(step)]) == 0, capsys.readouterr().err
            said = capsys.readouterr().err
            assert f"step {step} of 12" in " ".join(said.split())
            assert "The number is" in said
            loss = next(line["loss"] for line in read_metrics(trained / "metrics.jsonl") if line["step"] == step)
            assert said.count(repr(loss)) == 2
    finally:
        torch.set_num_threads(threads)


def test_a_step_that_comes_out_otherwise_is_told(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = shutil.copytree(trained, tmp_path / trained.name)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[2]["loss"] += 1e-6
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["replay", str(run), "--step", "3"]) == 2
    assert "differs from the log (loss)" in capsys.readouterr().err
    assert main(["replay", str(run), "--step", "13"]) == 2
    assert "expected one from 1 to 12" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_the_last_checkpoints_and_the_best_are_kept(trained: Path):
    kept = sorted(int(p.name.removeprefix("step-")) for p in (trained / "checkpoints").iterdir())
    judged = {
        line["step"]: line["heldout_loss"] for line in read_metrics(trained / "metrics.jsonl") if "heldout_loss" in line
    }
    assert judged.keys() == {5, 10}
    best = min(judged, key=lambda step: judged[step])
    assert kept == sorted({best, 9, 10, 11, 12})
    found = checkpoints.best(trained)
    assert found is not None
    assert found.name == f"step-{best:06d}"


def test_the_best_state_is_what_a_run_leaves(trained: Path, given: dict[str, list[str]], tmp_path: Path):
    """The adapter is that of a training which ends after the best step, its schedule apart."""
    from fgpt.io.safetensors_files import read_tensors

    best = checkpoints.best(trained)
    assert best is not None
    state = read_tensors(best / "state.safetensors")
    run = run_dir.instruction_run(trained)
    saved = leaves(run_dir.load_tuned(trained, fgpt.load(run.base)))
    for path, x in state.items():
        if path.startswith("trainable."):
            at, _, leaf = path.removeprefix("trainable.").rpartition("/")
            assert torch.equal(saved[f"{at}.w.{leaf}"], x), path


@pytest.mark.parametrize("damage", ["cut", "flip", "no manifest", "half a manifest", "no state", "another's manifest"])
def test_a_damaged_checkpoint_is_passed_over(
    damage: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: Any
):
    """The one before it is gone on from, one line says so, and the end is the same."""
    run = shutil.copytree(trained, tmp_path / "copy" / trained.name)
    (run / "status.json").write_text('{"state": "running", "steps": 12}\n')
    last = run / "checkpoints" / "step-000012"
    state, manifest = last / "state.safetensors", last / "manifest.json"
    data = bytearray(state.read_bytes())
    if damage == "cut":
        state.write_bytes(data[:-1])
    elif damage == "flip":
        data[-9] ^= 1
        state.write_bytes(data)
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "half a manifest":
        manifest.write_text(manifest.read_text()[:40])
    elif damage == "no state":
        state.unlink()
    else:
        shutil.copy(run / "checkpoints" / "step-000011" / "manifest.json", manifest)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(again(run)) == 0
    torch.set_num_threads(threads)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("using the checkpoint before it") == 1
    assert "resuming after step 11 of 12" in said
    same(end_of(run.parent), end_of(trained.parent))


def test_other_inputs_are_refused(trained: Path, tmp_path: Path, given: Any, capsys: pytest.CaptureFixture[str]):
    """A row or a number of the base that has changed would make another training of it."""
    run = shutil.copytree(trained, tmp_path / trained.name)
    values = json.loads((run / "run.json").read_text())
    rows = json.loads(Path(run_dir.instruction_run(run).data).read_text())
    rows[0]["output"] += " And more."
    write_json(tmp_path / "rows.json", rows)
    write_json(run / "run.json", values | {"data": str(tmp_path / "rows.json")})
    (run / "status.json").write_text('{"state": "running", "steps": 12}\n')
    before = {p: p.read_bytes() for p in run.rglob("*.safetensors")}
    assert main(again(run)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "was made from other inputs than there are now; changed: training rows. Restore them" in said
    assert before == {p: p.read_bytes() for p in run.rglob("*.safetensors")}


def test_the_hash_sees_every_number():
    base = fgpt.init(fgpt.Config(1, 2, 8, 16, 11, 16), fgpt.key(0))
    rows = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    told = {content_hash(base, rows)}
    for path in leaves(base):
        told.add(content_hash(replace_at(base, {path: torch.nextafter(leaves(base)[path], torch.tensor(9.0))}), rows))
    told |= {
        content_hash(base, rows[::-1]),
        content_hash(base, [torch.tensor([1, 2]), torch.tensor([3, 4])]),
        content_hash(base, rows[:1]),
    }
    assert len(told) == len(leaves(base)) + 4


def test_options_that_make_another_run_are_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = shutil.copytree(trained, tmp_path / trained.name)
    assert main(again(run)) == 2
    assert "has finished" in capsys.readouterr().err
    (run / "status.json").write_text('{"state": "interrupted", "steps": 12}\n')
    assert main(again(run, "--lr", "0.5")) == 2
    assert "was started with lr 0.006, not 0.5" in " ".join(capsys.readouterr().err.split())
    assert main(["train", "lora-nano", "--resume", "--out", str(tmp_path / "none")]) == 2
    assert "nothing to resume" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- links, and what is shared


def unfinished(trained: Path, at: Path) -> Path:
    run = shutil.copytree(trained, at / trained.name)
    (run / "status.json").write_text('{"state": "running", "steps": 12}\n')
    return run


def test_what_is_not_ours_stays(trained: Path, tmp_path: Path, given: Any):
    """Names that a user gives, whatever they begin with; our own leavings go."""
    run = unfinished(trained, tmp_path / "runs")
    theirs = [".gitlab-ci.yml", ".env.local", ".run.json.old", ".a.b.c", ".x.abcdefgh.fgpt-partial.txt"]
    for at in (run, run / "adapter", run / "checkpoints"):
        for name in theirs:
            (at / name).write_text("mine")
        (at / ".run.json.ab12_xyz.fgpt-partial").write_text("ours, half written")
    folder_of_theirs = run / ".cache.d"
    folder_of_theirs.mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / ".x.ab12_xyz.fgpt-partial").write_text("mine")
    (run / ".y.ab12_xyz.fgpt-partial").symlink_to(outside)  # of our form: the link goes, and not what is behind it
    assert ended(forked(again(run))) == 0
    for at in (run, run / "checkpoints"):
        assert [name for name in theirs if not (at / name).exists()] == []
        assert not (at / ".run.json.ab12_xyz.fgpt-partial").exists()
    assert folder_of_theirs.is_dir()
    assert [p.name for p in outside.iterdir()] == [".x.ab12_xyz.fgpt-partial"]


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "tensorboard", ".lock"])
def test_nothing_is_written_through_a_link(
    name: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: Any
):
    run, outside = unfinished(trained, tmp_path / "runs"), tmp_path / "outside"
    if name == ".lock":
        (run / name).write_text("mine")
    (run / name).rename(outside)
    (run / name).symlink_to(outside)
    files = [outside] if outside.is_file() else [p for p in outside.rglob("*") if p.is_file()]
    before = {p: p.read_bytes() for p in files}
    assert main(again(run)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{name} is a symbolic link, which fgpt does not write through" in said
    assert before == {p: p.read_bytes() for p in before}


def test_an_adapter_behind_a_link_is_replaced_and_not_emptied(trained: Path, tmp_path: Path, given: Any):
    run, outside = unfinished(trained, tmp_path / "runs"), tmp_path / "outside"
    (run / "adapter").rename(outside)
    (outside / "thesis.txt").write_text("mine")
    before = {p: p.read_bytes() for p in outside.iterdir()}
    (run / "adapter").symlink_to(outside)
    assert ended(forked(again(run))) == 0
    assert before == {p: p.read_bytes() for p in outside.iterdir()}
    assert (run / "adapter").is_dir()
    assert not (run / "adapter").is_symlink()


def test_a_run_that_is_renamed_while_it_trains(
    given: Any, whole: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """One line; nothing of it under the old name; under the new one it is gone on with."""
    args, (expected, _) = given["instruct"], whole["instruct"]
    pid, run, moved = forked(["train", *args, "--out", str(tmp_path)]), tmp_path / "lora-nano", tmp_path / "mine"
    until(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") >= 2)
    run.rename(moved)
    assert ended(pid) == 2
    assert "was renamed or deleted while it was in use" in " ".join(capfd.readouterr().err.split())
    assert not run.exists()
    assert ended(forked(["train", str(moved), "--resume"])) == 0
    same(end_of(tmp_path), expected)


@pytest.mark.parametrize(
    "name", ["../../x", "/abs/x", "a/b", "a\\b", ".", "..", ".x", "-x", "", "a\nb", "a\x1bb", "x" * 300]
)
def test_a_name_is_that_of_one_folder(name: str, given: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "a" / "b" / "runs"
    assert main(["train", *given["instruct"], f"--name={name}", "--out", str(out)]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert "expected the name of one folder" in said
    assert list(tmp_path.iterdir()) == []


def test_what_is_shared_names_no_place_and_nobody(trained: Path, given: Any, tmp_path: Path):
    """All that a run leaves, but the file of full paths and what PEFT's config says of the base."""
    import socket

    run = shutil.copytree(trained, tmp_path / trained.name)
    assert main(["report", str(run)]) == 0
    base = given["instruct"][given["instruct"].index("--base") + 1]
    for path in (p for p in run.rglob("*") if p.is_file()):
        assert socket.gethostname() not in path.name
        if path.name not in ("local.json", "adapter_config.json"):
            data = path.read_bytes()
            for place in (base, str(tmp_path), str(trained.parent), str(Path.home()) + "/"):
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


# --------------------------------------------------------------------------------------------- disks and neighbors


def test_a_full_disk_ends_in_one_line_with_the_last_checkpoint_whole(
    given: Any, whole: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """The kernel itself refuses a file above a size: first the metrics, then the checkpoints, outgrow it."""
    import resource

    def limited(size: int) -> Callable[[], None]:
        def limit() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        return limit

    args, (expected, _) = given["instruct"], whole["instruct"]
    assert ended(forked(["train", *args, "--out", str(tmp_path)], limited(2000))) == 2  # the state is larger
    (run,) = run_in(tmp_path)
    assert not list((run / "checkpoints").rglob("manifest.json"))
    pid = forked(again(run))
    until(lambda: bool(list((run / "checkpoints").glob("step-00000[45]/manifest.json"))))
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    size = (run / "metrics.jsonl").stat().st_size
    state = next((run / "checkpoints").rglob("state.safetensors")).stat().st_size
    assert ended(forked(again(run), limited(max(state - 1, size + 10)))) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert "File too large; free space" in said
    assert f"resume with: just train {run} --resume" in said
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    assert ended(forked(again(run))) == 0
    same(end_of(tmp_path), expected)


def test_a_folder_that_turns_read_only(given: Any, whole: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """After some files no more can be made: the checkpoints that are there stay whole, and are gone on from."""
    args, (expected, _) = given["instruct"], whole["instruct"]

    def spoil() -> None:
        make, left = tempfile.mkstemp, 12

        def refuse(*where: Any, **more: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return make(*where, **more)

        tempfile.mkstemp = refuse

    assert ended(forked(["train", *args, "--out", str(tmp_path)], spoil)) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert "Read-only file system; free space, then resume with: just train" in said
    (run,) = run_in(tmp_path)
    assert list((run / "checkpoints").rglob("manifest.json"))
    assert ended(forked(again(run))) == 0
    same(end_of(tmp_path), expected)


def test_a_folder_that_cannot_be_written_is_one_line(given: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    assert main(["train", *given["instruct"], "--out", str(tmp_path / "file")]) == 2
    assert "cannot make" in capsys.readouterr().err


def test_no_two_processes_train_in_one_folder(given: Any, whole: Any, tmp_path: Path):
    """Two begun at once have folders of their own; one that runs cannot be taken up."""
    args, (expected, _) = given["instruct"], whole["instruct"]
    pids = [forked(["train", *args, "--out", str(tmp_path)]) for _ in range(3)]
    until(lambda: len(run_in(tmp_path)) == 3)
    assert ended(forked(again(tmp_path / "lora-nano"))) == 2
    assert ended(forked(["train", str(tmp_path / "lora-nano-2"), "--resume"])) == 2
    assert [ended(pid) for pid in pids] == [0, 0, 0]
    for run in run_in(tmp_path):
        alone = tmp_path / "alone" / run.name
        shutil.copytree(run, alone / "lora-nano")
        same(end_of(alone), expected)


def test_a_reader_never_sees_a_torn_file(given: Any, tmp_path: Path):
    """While a training writes as often as it can, another process reads all there is, over and over."""
    pid, seen = forked(["train", *given["instruct"], "--out", str(tmp_path)]), 0
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
                seen += 1
    assert seen > 10


# -------------------------------------------------------------------------------------------------- how it may end


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_end_it_leaves_a_checkpoint_and_goes_on(number: int, given: Any, whole: Any, tmp_path: Path):
    """A process of its own, as a user has it."""
    args, (expected, _) = given["instruct"], whole["instruct"]
    command = [sys.executable, "-m", "fgpt", "train", *args, "--checkpoint-every-minutes", "99", "--out", str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = tmp_path / "lora-nano" / "metrics.jsonl"
    until(lambda: process.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") >= 2))
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "resume with: just train" in " ".join(said.split())
    run = tmp_path / "lora-nano"
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
    steps = [line["step"] for line in read_metrics(metrics)]
    assert steps[-1] < 12
    assert (run / "checkpoints" / f"step-{steps[-1]:06d}" / "manifest.json").is_file()
    assert ended(forked(again(run, "--checkpoint-every-minutes", "0"))) == 0
    same(end_of(tmp_path), expected)


def test_a_leaf_that_never_moves_is_an_error(given: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """At a rate below what fp32 shows of numbers near 1 no norm's gain moves: nothing would be trained, in silence."""
    args = [*given["instruct"][:3], *given["instruct"][3:], "--adapter.kind", "ln", "--adapter.target", r".*ln_.*\.w"]
    args = [*args, "--adapter.dropout", "0", "--optimizer", "adamw", "--lr", "1e-9", "--out", str(tmp_path)]
    assert main(["train", *args]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "3 of 3 trained leaves did not change in two steps (blocks.0.ln_1.w, blocks.0.ln_2.w, ln_f.w)" in said


def test_a_line_that_was_cut_off_does_no_harm(trained: Path, tmp_path: Path):
    whole_file = (trained / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole_file + whole_file[:40])
    assert read_metrics(tmp_path / "metrics.jsonl") == read_metrics(trained / "metrics.jsonl")
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
