"""Trainings in processes of their own, that are killed and go on.

What every training imports is imported here, once, and not in each process that is forked.
"""

# ruff: noqa: F401

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot
import rouge_score.rouge_scorer
import sklearn.metrics
import torch
import torch.utils.tensorboard
from matplotlib.figure import Figure

import fgpt.cli.evaluation.compare
import fgpt.cli.tasks.classification
import fgpt.cli.tasks.instruction_tuning
import fgpt.cli.tasks.pretraining
from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.training import checkpoints
from fgpt.kernels import bitsandbytes_ops

bitsandbytes_ops.register()


def write_nothing_drawn(figure: Figure, file: Any, **_: Any) -> None:
    """In the place of matplotlib's drawing, which takes as long as a training of these."""
    file.write(b"a chart")


def run_in_fork(args: Sequence[str], spoil: Callable[[], Any] = lambda: None) -> int:
    """Run the command line in a process of its own, with what is imported already; its number."""
    if pid := os.fork():
        return pid
    code = 70
    try:
        torch.set_num_threads(1)  # no pool of threads outlives a fork
        Figure.savefig = write_nothing_drawn
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


def exit_status(pid: int) -> int:
    """The exit status of a process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(20_000):
        if holds():
            return
        time.sleep(0.005)
    raise AssertionError("it did not come to that in 100 s")


def run_in(out: Path) -> list[Path]:
    """The folders of runs that were begun."""
    return [path.parent for path in out.glob("*/run.json")]


FILES = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "adapters.safetensors",
    "model.safetensors",
    "compare.json",
)


def final_files(out: Path, by_clock: bool = False) -> dict[str, Any]:
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


def assert_same_files(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name


def resume(run: Path, *args: str) -> list[str]:
    return ["train", run.name, "--out", str(run.parent), "--resume", *args]
