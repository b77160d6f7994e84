"""Where a device gives no equal bits, a step that is computed again is compared up to rounding, and says so; with
deterministic algorithms, bit by bit. A CPU stands for that device by one predicate.
"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.training import reproducibility
from fgpt.cli.training.reproducibility import CUBLAS_WORKSPACE, differing, rounding, use_determinism
from fgpt.cli.training.step_log import MetricsLog
from fgpt.errors import InputError
from fgpt.recipes import find

CPU = torch.device("cpu")


@pytest.fixture
def any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, unless deterministic algorithms are in use."""
    enabled = torch.are_deterministic_algorithms_enabled
    monkeypatch.setattr(reproducibility, "bitwise_reproducible", lambda device: enabled())


def with_log(run: Path, to: Path, **factors: float) -> Path:
    """A copy of the run whose log has step 3 with some values multiplied."""
    copy = shutil.copytree(run, to / run.name)
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    for name, factor in factors.items():
        lines[2][name] *= factor
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return copy


@pytest.mark.usefixtures("any_order")
@pytest.mark.parametrize(
    ("factors", "status"),
    [
        ({"loss": 1 + 1e-5, "grad_norm": 1 - 1e-4}, 0),
        ({"loss": 1.01}, 2),
        ({"grad_norm": 0.99}, 2),
        ({"weight": 1 + 1e-5}, 2),
    ],
)
def test_a_replay_is_compared_up_to_rounding(
    factors: dict[str, float],
    status: int,
    checkpointed_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    run = with_log(checkpointed_run, tmp_path, **factors)
    assert main(["replay", str(run), "--step", "3"]) == status
    output = " ".join(capsys.readouterr().err.split())
    assert "compared up to rounding, 0.001 of each value" in output
    assert ("differs from the log" in output) == (status == 2)


def test_a_replay_on_a_cpu_is_compared_bit_by_bit(
    checkpointed_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["replay", str(with_log(checkpointed_run, tmp_path, loss=1 + 1e-5)), "--step", "3"]) == 2
    assert "up to rounding" not in capsys.readouterr().err


@pytest.mark.parametrize(("tolerance", "told"), [(0.0, True), (1e-3, False)])
def test_a_step_that_is_taken_again(tolerance: float, told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    line: dict[str, Any] = {"step": 2, "loss": 2.0, "grad_norm": 0.5}
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with MetricsLog(path, 1, tolerance) as log:
        log.write(line | {"loss": 2.0001})
    assert ("differs from its first computation" in capsys.readouterr().err) == told
    with MetricsLog(path, 1, tolerance) as log:
        log.write(line | {"loss": 2.5})
    assert "differs from its first computation" in capsys.readouterr().err


def test_the_tolerance_is_that_of_the_dtype(any_order: None):
    recipe = find("lora-nano")
    assert rounding(replace(recipe, dtype="float32"), CPU) < rounding(replace(recipe, dtype="bfloat16"), CPU) < 0.05
    assert differing({"loss": 1.0}, {"loss": 1.0, "weight": 3.0}, 0.0) == []  # what was not logged is not compared


def test_on_a_cpu_there_is_no_tolerance():
    assert rounding(find("lora-nano"), CPU) == 0.0


def test_deterministic_algorithms_demand_equal_bits(any_order: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(CUBLAS_WORKSPACE, raising=False)
    recipe = replace(find("lora-nano"), dtype="float32", device="cpu")
    try:
        use_determinism(recipe)
        assert not torch.are_deterministic_algorithms_enabled()
        assert CUBLAS_WORKSPACE not in os.environ
        use_determinism(replace(recipe, deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ[CUBLAS_WORKSPACE] == ":4096:8"
        assert rounding(recipe, CPU) == 0.0
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setenv(CUBLAS_WORKSPACE, ":0:0")
    with pytest.raises(InputError, match="CUBLAS_WORKSPACE_CONFIG is ':0:0': --deterministic needs :4096:8 or"):
        use_determinism(replace(recipe, deterministic=True))


@pytest.mark.slow
def test_on_a_cpu_the_option_changes_nothing(training_args: Any, tmp_path: Path):
    metrics = []
    for name, more in (("plain", []), ("deterministic", ["--deterministic"])):
        args = [*training_args["instruct"], "--steps", "3", "--no-keep-best", "--compare-prompts", "0"]
        assert main(["train", *args, "--name", name, "--out", str(tmp_path), *more]) == 0
        metrics.append([(line["loss"], line["grad_norm"]) for line in read_metrics(tmp_path / name / "metrics.jsonl")])
    assert metrics[0] == metrics[1]
    assert not torch.are_deterministic_algorithms_enabled()
    assert json.loads((tmp_path / "deterministic" / "run.json").read_text())["deterministic"] is True
