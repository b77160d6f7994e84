"""`fgpt combine`: runs of one base as a new run, which every other command takes; others are refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import close
from builders.command_line import training_options
from builders.runs import one_line

import fgpt
from fgpt.cli import run_dir
from fgpt.cli.main import main
from fgpt.cli.tasks import task_type
from fgpt.tree import leaves

KINDS = {
    "lora": ["--adapter.kind", "lora", "--adapter.rank", "2"],
    "dora": ["--adapter.kind", "dora", "--adapter.rank", "3"],
    "full": ["--adapter.kind", "full"],
    "int8": ["--adapter.kind", "lora", "--quantize", "int8"],
}


@pytest.fixture(scope="module")
def runs(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("combining")
    for name, options in KINDS.items():
        common = [*training_options(project), "--compare-prompts", "0", "--lr", "1e-2", "--out", str(out)]
        assert main(["train", *common, *options, "--name", name]) == 0
    return out


def meaning(folder: Path) -> dict[str, torch.Tensor]:
    recipe: Any = run_dir.read_run(folder)
    base = task_type(recipe).load_base(recipe)
    return leaves(fgpt.merge(run_dir.load_tuned(folder, base)))


@pytest.mark.slow
@pytest.mark.parametrize("names", [("lora", "dora"), ("lora", "full"), ("lora", "lora")])
def test_a_combination_is_a_run(names: tuple[str, str], runs: Path, capsys: pytest.CaptureFixture[str]):
    name = f"both-{'-'.join(names)}"
    weights = ["--weights", "0.75", "-0.5"]
    assert main(["combine", *names, *weights, "--name", name, "--out", str(runs)]) == 0
    assert "linear combination of 0.75" in " ".join(capsys.readouterr().err.split())
    recipe: Any = run_dir.read_run(runs / "lora")
    base = leaves(task_type(recipe).load_base(recipe))
    first, second, both = (meaning(runs / each) for each in (*names, name))
    for path, x in base.items():
        close(both[path], x + 0.75 * (first[path] - x) - 0.5 * (second[path] - x), 1e-5)
    for command in (["generate", str(runs / name), "Say 3.", "--max-new-tokens", "2"], ["merge", str(runs / name)]):
        assert main(command) == 0
    assert main(["eval", "run", str(runs / name)]) == 0
    assert main(["report", str(runs / name)]) == 0
    assert main(["runs", "--out", str(runs)]) == 0
    record = json.loads((runs / name / "combine.json").read_text())
    assert (record["weights"], record["method"]) == ([0.75, -0.5], "linear")


@pytest.mark.parametrize("method", ["linear", "ties", "dare", "slerp"])
def test_to_a_rank(method: str, runs: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--method", method, "--rank", "4", "--name", f"{method}-4", "--out", str(runs)]
    assert main(["combine", "lora", "dora", *options]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "LoRAs of rank" in said
    assert ("rank 4 leaves out" in said) == (method == "linear")
    assert (runs / f"{method}-4" / "adapter" / "adapter_model.safetensors").exists()  # which PEFT reads


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["lora"], "expected two runs or more"),
        (["lora", "nowhere"], "no trained run 'nowhere'"),
        (["lora", "int8"], "has quantize int8, and"),
        (["lora", "dora", "--weights", "1"], "expected 2 finite numbers"),
        (["lora", "dora", "--method", "slerp", "--weights", "1", "1"], "with weights 1 - t and t"),
        (["lora", "dora", "--method", "tise"], "did you mean ties?"),
        (["lora", "dora", "--density", "0"], "--density is 0"),
        (["lora", "told[b]"], "is not an instruction-tuned run"),
    ],
)
def test_what_cannot_be_combined(
    args: list[str], message: str, runs: Path, project: Path, capsys: pytest.CaptureFixture[str]
):
    args = [str(project / "runs" / x) if x == "told[b]" else x for x in args]
    assert main(["combine", *args, "--name", "never", "--out", str(runs)]) == 2
    assert message in one_line(capsys)
    assert not (runs / "never").exists()
