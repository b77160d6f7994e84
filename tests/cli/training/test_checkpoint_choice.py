"""Which checkpoints stay; a damaged one is passed over."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.resume import assert_same_files, final_files, resume

import fgpt
from fgpt.cli import run_dir
from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.training import checkpoints
from fgpt.tree import leaves


@pytest.mark.slow
def test_the_last_checkpoints_and_the_best_are_kept(checkpointed_run: Path):
    steps = sorted(int(p.name.removeprefix("step-")) for p in (checkpointed_run / "checkpoints").iterdir())
    judged = {
        line["step"]: line["heldout_loss"]
        for line in read_metrics(checkpointed_run / "metrics.jsonl")
        if "heldout_loss" in line
    }
    assert judged.keys() == {5, 10}
    best = min(judged, key=lambda step: judged[step])
    assert steps == sorted({best, 9, 10, 11, 12})
    found = checkpoints.best(checkpointed_run)
    assert found is not None
    assert found.name == f"step-{best:06d}"


def test_the_best_state_is_what_a_run_leaves(
    checkpointed_run: Path, training_args: dict[str, list[str]], tmp_path: Path
):
    """The adapter is that of a training which ends after the best step, its schedule apart."""
    from fgpt.io.safetensors_files import read_tensors

    best = checkpoints.best(checkpointed_run)
    assert best is not None
    state = read_tensors(best / "state.safetensors")
    run = run_dir.instruction_run(checkpointed_run)
    saved = leaves(run_dir.load_tuned(checkpointed_run, fgpt.load(run.base)))
    for path, x in state.items():
        if path.startswith("trainable."):
            at, _, leaf = path.removeprefix("trainable.").rpartition("/")
            assert torch.equal(saved[f"{at}.w.{leaf}"], x), path


@pytest.mark.parametrize("damage", ["cut", "flip", "no manifest", "half a manifest", "no state", "another's manifest"])
def test_a_damaged_checkpoint_is_passed_over(
    damage: str, checkpointed_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], training_args: Any
):
    """The one before it is gone on from, one line says so, and the end is the same."""
    run = shutil.copytree(checkpointed_run, tmp_path / "copy" / checkpointed_run.name)
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
    assert main(resume(run)) == 0
    torch.set_num_threads(threads)
    output = " ".join(capsys.readouterr().err.split())
    assert output.count("using the checkpoint before it") == 1
    assert "resuming after step 11 of 12" in output
    assert_same_files(final_files(run.parent), final_files(checkpointed_run.parent))
