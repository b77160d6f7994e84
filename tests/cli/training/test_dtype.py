"""A run in bfloat16 is used in bfloat16, wherever auto would be another dtype."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fgpt.cli import devices
from fgpt.cli.main import main


@pytest.fixture(scope="module")
def bf16_run(training_args: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in bfloat16, as auto gives it on a GPU."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "resolve_dtype", resolve_as_on_a_gpu)
        patch.setattr("fgpt.cli.training.build.resolve_dtype", resolve_as_on_a_gpu)
        assert main(["train", *training_args["instruct"], "--keep-checkpoints", "20", "--out", str(out)]) == 0
    return out / "lora-nano"


def resolve_as_on_a_gpu(name: str, device: torch.device) -> torch.dtype:
    return torch.bfloat16 if name == "auto" else getattr(torch, name)


@pytest.mark.slow
def test_a_run_records_its_dtype_and_is_used_in_it(bf16_run: Path, capsys: pytest.CaptureFixture[str]):
    """On a machine where auto is another dtype."""
    assert json.loads((bf16_run / "run.json").read_text())["dtype"] == "bfloat16"
    assert main(["replay", str(bf16_run), "--step", "5"]) == 0
    assert "bfloat16 on cpu" in " ".join(capsys.readouterr().err.split())
    for command in (["generate", str(bf16_run), "Say it."], ["eval", "run", str(bf16_run), "--limit", "4"]):
        more = ["--max-new-tokens", "4"] if command[0] == "generate" else []
        assert main([*command, *more]) == 0
    assert main(["merge", str(bf16_run)]) == 0
    assert json.loads((bf16_run / "merged" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert main(["report", str(bf16_run)]) == 0
    assert "bfloat16" in (bf16_run / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--dtype", "auto"]])
def test_a_run_is_resumed_in_its_dtype(bf16_run: Path, more: list[str], capsys: pytest.CaptureFixture[str]):
    before = (bf16_run / "adapter" / "adapter_model.safetensors").read_bytes()
    for folder in (bf16_run / "checkpoints").iterdir():
        if folder.name > "step-000004":
            shutil.rmtree(folder)
    (bf16_run / "status.json").write_text('{"state": "interrupted", "steps": 12}\n')
    assert main(["train", str(bf16_run), "--resume", *more]) == 0
    output = " ".join(capsys.readouterr().err.split())
    assert "resuming after step 4" in output
    assert "bfloat16 on cpu" in output
    assert "differs from its first computation" not in output
    assert (bf16_run / "adapter" / "adapter_model.safetensors").read_bytes() == before
