"""Several processes train as one does, end together, and lose nothing when one of them is lost."""

import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.processes import errors_in, free_port, run_processes, start_processes
from builders.resume import exit_status, run_in, wait_until
from builders.torchrun import launch_together, run_together

from fgpt import recipes
from fgpt.cli.main import main
from fgpt.cli.metrics_log import HELDOUT_LOSS, read_metrics
from fgpt.cli.training import checkpoints, shared_update
from fgpt.errors import InputError
from fgpt.io.safetensors_files import read_tensors

STEPS, KILLS = 12, 20


@pytest.fixture(scope="session")
def args(training_args: dict[str, list[str]]) -> dict[str, list[str]]:
    """Small trainings with dropout whose updates have six ragged micro-batches."""
    six = ["--grad-accumulation-steps", "6", "--compare-prompts", "0"]
    instruct = [x for x in training_args["instruct"] if x not in ("--optimizer", "adamw8bit")]
    return {
        "instruct": [*instruct, *six, "--lr", "2e-3"],
        "classify": [*training_args["classify"], "--grad-accumulation-steps", "6", "--lr", "2e-3"],
        "pretrain": [*training_args["pretrain"], "--grad-accumulation-steps", "6", "--lr", "2e-3"],
    }


@pytest.fixture(scope="session")
def alone(args: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What one process makes of each."""
    runs = {}
    for kind, command in args.items():
        out = tmp_path_factory.mktemp(kind)
        assert run_processes(["train", *command, "--out", str(out)], 1, out / "log") == [0]
        (runs[kind],) = run_in(out)
    return runs


def trained(run: Path) -> torch.Tensor:
    names = ("adapter_model.safetensors", "adapters.safetensors", "model.safetensors")
    (path,) = [path for path in run.rglob("*") if path.name in names]
    return torch.cat([x.flatten().double() for _, x in sorted(read_tensors(path).items())])


def assert_same_run(run: Path, expected: Path) -> None:
    """Trained leaves to 1e-6 of their norm, and every step's loss to 1e-5."""
    a, b = trained(run), trained(expected)
    assert (a - b).norm() <= 1e-6 * b.norm()
    lines, others = ({line["step"]: line for line in read_metrics(at / "metrics.jsonl")} for at in (run, expected))
    assert lines.keys() == others.keys()
    for step, line in lines.items():
        assert line["loss"] == pytest.approx(others[step]["loss"], rel=1e-5)
        assert line.get(HELDOUT_LOSS, 0.0) == pytest.approx(others[step].get(HELDOUT_LOSS, 0.0), rel=1e-5)
        assert line["tokens"] == others[step]["tokens"]
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    recipes = [json.loads((at / "run.json").read_text()) for at in (run, expected)]
    assert len({json.dumps({**recipe, "out": "", "shard_base": False}) for recipe in recipes}) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("instruct", 2), ("instruct", 3), ("classify", 3), ("pretrain", 2)])
def test_they_train_as_one_does(
    kind: str, count: int, args: dict[str, list[str]], alone: dict[str, Path], tmp_path: Path
) -> None:
    command = ["train", *args[kind], "--out", str(tmp_path / "runs")]
    assert run_processes(command, count, tmp_path / "log") == [0] * count
    (run,) = run_in(tmp_path / "runs")
    assert_same_run(run, alone[kind])
    assert not errors_in(tmp_path / "log")
    assert (tmp_path / "log").read_text().count("saved the state after") == 1  # one process speaks


def end_as_torchrun_does(pids: list[int], lost: int) -> list[int]:
    """The exit codes: the others get SIGTERM, and SIGKILL if they have not ended a while later. Nothing happens to them
    if the one that was to be lost had ended already.
    """
    codes = {lost: exit_status(pids[lost])}
    others = [rank for rank in range(len(pids)) if rank != lost]
    for rank in others if codes[lost] else []:
        os.kill(pids[rank], signal.SIGTERM)  # one that has ended waits for its exit code to be read
    until = time.monotonic() + 30
    while len(codes) < len(pids):
        for rank in others:
            if rank not in codes and os.waitid(os.P_PID, pids[rank], os.WEXITED | os.WNOHANG | os.WNOWAIT):
                codes[rank] = exit_status(pids[rank])
            elif rank not in codes and time.monotonic() > until:
                os.kill(pids[rank], signal.SIGKILL)
        time.sleep(0.01)
    return [codes[rank] for rank in range(len(pids))]


@pytest.mark.slow
def test_a_rank_killed_at_random_moments(args: dict[str, list[str]], alone: dict[str, Path], tmp_path: Path) -> None:
    """20 kills of any rank, each time resumed on another number of processes: no run is lost, and all end alike."""
    chance, kills, ends = random.Random(0), 0, 0
    while kills < KILLS:
        out = tmp_path / str(ends)
        command, count = ["train", *args["instruct"], "--out", str(out)], chance.choice([2, 3])
        while True:
            pids = start_processes(command, count, tmp_path / "log")
            target, victim = last_step(out) + chance.randint(0, 6), chance.randrange(count)
            if target > STEPS:
                codes = [exit_status(pid) for pid in pids]
            else:
                wait_for_step(out, target)
                time.sleep(chance.uniform(0, 0.15))
                os.kill(pids[victim], signal.SIGKILL)
                codes = end_as_torchrun_does(pids, victim)
            if codes[0] == 0:
                break  # all was done
            assert codes[victim] == -signal.SIGKILL
            assert all(code != 0 for code in codes)
            kills += 1
            count = chance.choice([1, 2, 3])
            if run_in(out):
                command = ["train", "lora-nano", "--resume", "--out", str(out)]
            else:
                shutil.rmtree(out, ignore_errors=True)
        (run,) = run_in(out)
        assert_same_run(run, alone["instruct"])
        ends += 1


def last_step(out: Path) -> int:
    """Of the last checkpoint."""
    names = [path.name for run in run_in(out) for path in (run / checkpoints.FOLDER).glob("step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def wait_for_step(out: Path, step: int) -> None:
    wait_until(lambda: last_step(out) >= step)


@pytest.mark.slow
def test_a_signal_to_one_ends_all_at_one_step(
    args: dict[str, list[str]], alone: dict[str, Path], tmp_path: Path
) -> None:
    out, log = tmp_path / "runs", tmp_path / "log"
    pids = start_processes(["train", *args["instruct"], "--out", str(out)], 2, log)
    wait_for_step(out, 2)
    os.kill(pids[1], signal.SIGTERM)
    assert [exit_status(pid) for pid in pids] == [130, 130]
    (run,) = run_in(out)
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
    assert (run / "adapter").is_dir()
    assert "interrupted after" in log.read_text()
    assert run_processes(["train", str(run), "--resume"], 3, log) == [0, 0, 0]
    assert_same_run(run, alone["instruct"])


@pytest.mark.slow
def test_a_base_in_parts_trains_to_the_bit(args: dict[str, list[str]], tmp_path: Path) -> None:
    """On three processes, of six micro-batches and of rows that run out; and a run goes on with the whole base."""
    log, runs = tmp_path / "log", {}
    size = ["--quantize", "int8", "--grad-accumulation-steps", "3", "--no-keep-best"]
    for name, options, count in (("parts", ["--shard-base"], 3), ("whole", [], 3), ("resumed", ["--shard-base"], 2)):
        command = ["train", *args["instruct"], *size, *options, "--out", str(tmp_path / name)]
        if name == "resumed":
            command += ["--grad-accumulation-steps", "2"]
            pids = start_processes(command, count, log)
            wait_for_step(tmp_path / name, 2)
            os.kill(pids[1], signal.SIGTERM)
            assert [exit_status(pid) for pid in pids] == [130, 130]
            (run,) = run_in(tmp_path / name)
            assert run_processes(["train", str(run), "--resume", "--no-shard-base"], 1, log) == [0]
        else:
            assert run_processes(command, count, log) == [0] * count
        (runs[name],) = run_in(tmp_path / name)
        assert not errors_in(log)
    assert torch.equal(trained(runs["parts"]), trained(runs["whole"]))


@pytest.mark.slow
def test_full_tuning_in_parts_is_that_of_one(args: dict[str, list[str]], tmp_path: Path) -> None:
    """On three processes with the best state kept; and ended on two, gone on with by one, whole, and by three."""
    log, runs = tmp_path / "log", {}
    full = [*args["instruct"], "--adapter.kind", "full", "--adapter.target", ".*", "--lr", "5e-4", "--ema-decay", "0.5"]
    full += ["--lr-multipliers", r"wte\.w=0.5", r"blocks\.0\..*=2"]
    for name, count, parts in (("alone", 1, []), ("parts", 3, ["--shard-base"])):
        command = ["train", *full, *parts, "--out", str(tmp_path / name)]
        assert run_processes(command, count, log) == [0] * count, log.read_text()
        (runs[name],) = run_in(tmp_path / name)
        assert not errors_in(log)
    assert_same_run(runs["parts"], runs["alone"])
    states = [read_tensors(best_checkpoint(run)) for run in runs.values()]
    assert {name: x.shape for name, x in states[0].items()} == {name: x.shape for name, x in states[1].items()}

    out = tmp_path / "ended"
    pids = start_processes(["train", *full, "--shard-base", "--out", str(out)], 2, log)
    wait_for_step(out, 2)
    os.kill(pids[1], signal.SIGTERM)
    assert [exit_status(pid) for pid in pids] == [130, 130]
    (run,) = run_in(out)
    shutil.copytree(run, tmp_path / "copy" / run.name)
    assert run_processes(["train", str(run), "--resume"], 3, log) == [0, 0, 0], log.read_text()
    assert_same_run(run, runs["alone"])
    copy = tmp_path / "copy" / run.name
    assert run_processes(["train", str(copy), "--resume", "--no-shard-base"], 1, log) == [0], log.read_text()
    assert_same_run(copy, runs["alone"])


@pytest.mark.slow
def test_a_classifier_in_parts_is_scored_as_a_whole_one(args: dict[str, list[str]], tmp_path: Path) -> None:
    """Where a part of the base stays frozen, all processes score it."""
    log, scores = tmp_path / "log", {}
    part = [*args["classify"], "--adapter.kind", "full", "--adapter.target", r"blocks\..*mlp.*\.w"]
    lora = [*args["classify"], "--adapter.kind", "lora"]
    for kind, options in (("full", part), ("lora", lora)):
        for count, parts in ((1, []), (2, ["--shard-base"])):
            out = tmp_path / f"{kind}-{count}"
            command = ["train", *options, "--optimizer", "adamw", "--steps", "3", *parts, "--out", str(out)]
            assert run_processes(command, count, log) == [0] * count, log.read_text()
            (run,) = run_in(out)
            scores[count] = json.loads((run / "metrics.json").read_text())["scores"]["tuned"]
        assert scores[2]["loss"] == pytest.approx(scores[1]["loss"], rel=1e-4), kind
        assert scores[2]["accuracy"] == scores[1]["accuracy"], kind


def best_checkpoint(run: Path) -> Path:
    folder = checkpoints.best(run)
    assert folder is not None
    return folder / checkpoints.STATE


@pytest.mark.slow
def test_a_process_that_is_lost_loses_its_part(args: dict[str, list[str]], tmp_path: Path) -> None:
    """So the run goes on from its last periodic checkpoint, here from none."""
    log, out = tmp_path / "log", tmp_path / "runs"
    full = [*args["instruct"], "--adapter.kind", "full", "--adapter.target", ".*", "--shard-base"]
    full += ["--no-keep-best", "--checkpoint-every-minutes", "60", "--steps", "30"]
    pids = start_processes(["train", *full, "--eval-every", "1000", "--out", str(out)], 2, log)
    wait_until(lambda: any(len(path.read_text().splitlines()) >= 3 for path in out.glob("*/metrics.jsonl")))
    os.kill(pids[1], signal.SIGKILL)
    assert exit_status(pids[0]) == 2
    exit_status(pids[1])
    (line,) = errors_in(log)
    assert "rank 1 was lost: resume with" in line
    (run,) = run_in(out)
    assert not list((run / checkpoints.FOLDER).glob("step-*"))
    assert run_processes(["train", str(run), "--resume"], 2, log) == [0, 0], log.read_text()
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(args: dict[str, list[str]], tmp_path: Path) -> None:
    out, log = tmp_path / "runs", tmp_path / "log"
    pids = start_processes(["train", *args["instruct"], "--out", str(out)], 2, log, FGPT_TIMEOUT="3")
    wait_for_step(out, 2)
    os.kill(pids[1], signal.SIGSTOP)
    assert exit_status(pids[0]) == 2
    os.kill(pids[1], signal.SIGKILL)
    exit_status(pids[1])
    (line,) = errors_in(log)
    assert "rank 1 hangs (rank 0 waited 3 s, FGPT_TIMEOUT)" in line
    (run,) = run_in(out)
    assert f"resume with: fgpt train {run} --resume" in line


def with_other_code(rank: int) -> None:
    shared_update._code_hash = lambda: f"{rank}" * 64  # pyright: ignore[reportPrivateUsage]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("others", "spoil", "expected"),
    [
        (
            ["--seed", "4"],
            None,
            "error: rank 1 differs from rank 0 in seed, training rows, heldout rows (seed: 4, not 3): give all",
        ),
        (["--num-heldout", "5"], None, "num_heldout"),
        (["--data", "{other}"], None, "error: rank 1 differs from rank 0 in training rows, heldout rows"),
        ([], with_other_code, "error: rank 1 differs from rank 0 in code: give all"),
        (["--data", "missing.json"], None, "error: rank 1: "),
    ],
    ids=["seed", "option", "rows", "code", "file"],
)
def test_ranks_that_differ_do_not_begin(
    others: list[str], spoil: Any, expected: str, args: dict[str, list[str]], tmp_path: Path
) -> None:
    rows = [{"instruction": f"Tell {i}.", "output": f"It is {i}. " * (1 + i % 3)} for i in range(30)]
    (tmp_path / "other.json").write_text(json.dumps(rows))
    others = [x.format(other=tmp_path / "other.json") for x in others]
    out, log = tmp_path / "runs", tmp_path / "log"
    command = ["train", *args["instruct"], "--out", str(out)]
    codes = run_processes([command, [*command, *others]], 2, log, spoil=spoil or (lambda rank: None))
    assert codes == [2, 2]
    (line,) = errors_in(log)
    assert expected in line
    assert not out.exists()


@pytest.mark.slow
def test_an_error_of_all_is_one_line(args: dict[str, list[str]], tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = ["train", *args["instruct"], "--lr", "1e38", "--out", str(tmp_path / "runs")]
    assert run_processes(command, 3, log) == [2, 2, 2]
    (line,) = errors_in(log)
    assert "expected finite numbers" in line


@pytest.mark.parametrize(
    ("command", "count", "line"),
    [
        (
            ["train", "lora-nano", "--micro-batch-size", "4"],
            2,
            "error: --grad-accumulation-steps is 1, and 2 processes share these micro-batches of an update: expected a "
            "multiple of 2; the same update of 4 rows is --micro-batch-size 2 --grad-accumulation-steps 2",
        ),
        (["train", "lora-nano"], 3, "error: --grad-accumulation-steps is 1, and 3 processes"),
        (
            ["chat", "lora-nano"],
            2,
            "error: fgpt chat runs in one process, and torchrun has started 2: start it without torchrun",
        ),
        (["train", "lora-nano", "--cuda-graphs"], 2, "error: --cuda-graphs records the step of one process"),
        (
            ["train", "full-nano", "--shard-base"],
            2,
            "error: --shard-base puts what --adapter.kind full trains in parts, and --optimizer adamw8bit is of whole",
        ),
        (
            ["train", "lora-nano", "--shard-base", "--per-example"],
            2,
            "error: --shard-base and --per-example do not go together: leave one of them out",
        ),
        (["train", "dpo-nano", "--shard-base"], 2, "error: --shard-base is of instruction tuning and classification"),
    ],
)
def test_what_several_cannot_do(command: list[str], count: int, line: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run_processes(command, count, log) == [2] * count
    assert [text for text in log.read_text().splitlines() if text.startswith("error")] == errors_in(log)
    assert [text[: len(line)] for text in errors_in(log)] == [line]


def test_a_micro_batch_that_each_would_measure() -> None:
    """On a GPU, where `auto` is no number yet."""
    recipe = dataclasses.replace(recipes.find("lora-nano"), micro_batch_size="auto")
    with pytest.raises(InputError, match="--micro-batch-size auto measures the memory of one process"):
        shared_update.check_shared_update(recipe, 2)


def test_a_port_in_use(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        pids = start_processes(["train", "lora-nano"], 2, log, port=port)
        assert exit_status(pids[0]) == 2
        os.kill(pids[1], signal.SIGKILL)  # as torchrun does: it talks to what has the port
        exit_status(pids[1])
    (line,) = errors_in(log)
    assert line == f"error: the port of 127.0.0.1:{port} is in use: give another, torchrun --master-port N"


def test_a_timeout_that_is_no_number(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run_processes(["train", "lora-nano"], 2, log, FGPT_TIMEOUT="soon") == [2, 2]
    assert errors_in(log) == ["error: FGPT_TIMEOUT is 'soon': expected a number of seconds, such as 1800"]


@pytest.mark.slow
def test_under_torchrun_one_command_begins_and_resumes(
    args: dict[str, list[str]], alone: dict[str, Path], tmp_path: Path
) -> None:
    """`--auto-resume` begins a training, goes on with it after a kill, and then has nothing to do."""
    command = ["-m", "fgpt", "train", *args["instruct"], "--auto-resume", "--out", str(tmp_path)]
    first = launch_together(2, *command)
    wait_for_step(tmp_path, 2)
    first.send_signal(signal.SIGTERM)  # as a spot machine is told that it ends
    _, text = first.communicate()
    assert first.returncode != 0
    assert "interrupted after" in text
    second = run_together(2, *command)
    assert second.returncode == 0, second.stderr[-3000:]
    assert "resuming after step" in second.stderr
    (run,) = run_in(tmp_path)
    assert_same_run(run, alone["instruct"])
    assert main(["train", *args["instruct"], "--auto-resume", "--out", str(tmp_path)]) == 0
    assert run_in(tmp_path) == [run]
