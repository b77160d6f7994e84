"""Training on FinQA and other instructions together."""

import json
from pathlib import Path

import pytest
from builders import gpt2_shape
from builders.finqa import FINQA_RECORD

import fgpt
from fgpt.cli.main import main
from fgpt.cli.training.build import build_adapters
from fgpt.data.finqa import ELLIPSIS
from fgpt.recipes import RECIPES, InstructionRecipe, find


@pytest.mark.parametrize(
    ("name", "shape", "trained"),
    [
        ("lora-large", (36, 20, 1280), 36 * 8 * (4 * 2 * 1280 + 2 * 5 * 1280) + 8 * (50257 + 1280)),
        ("lora-lima", (24, 16, 1024), 24 * 8 * 4 * 2 * 1024),
        ("dolly-small-lora", (12, 12, 768), 12 * 8 * 4 * 2 * 768),
        ("dolly-finqa-lora", (12, 12, 768), 12 * 8 * 4 * 2 * 768),
    ],
)
def test_what_the_runs_train(name: str, shape: tuple[int, int, int], trained: int):
    run = find(name)
    assert isinstance(run, InstructionRecipe)
    assert fgpt.num_trainable(build_adapters(run, gpt2_shape(*shape))) == trained
    assert f"{trained:,} trained parameters" in (RECIPES[name].__doc__ or "")
    assert (run.max_seq_len, run.adapter.rank, run.adapter.alpha, run.peak_lr) == (1024, 8, 16, 3e-4)


@pytest.mark.slow
def test_a_mixed_run_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Pages longer than the rows are trained on whole but for their text; comparison and evaluation see the same."""
    dolly, finqa, out = tmp_path / "dolly.jsonl", tmp_path / "train.json", tmp_path / "runs"
    dolly.write_text(
        "\n".join(json.dumps({"instruction": f"Say {i}.", "context": "", "response": "I do."}) for i in range(6))
    )
    long = FINQA_RECORD | {"pre_text": ["the fox ran home ."] * 99}
    finqa.write_text(json.dumps([long] * 6 + [FINQA_RECORD] * 2))
    data = ["--data", str(dolly), str(finqa), "--columns.input", "context", "--columns.output", "response"]
    size = [
        "--max-seq-len",
        "192",
        "--steps",
        "2",
        "--warmup-steps",
        "1",
        "--micro-batch-size",
        "1",
        "--num-heldout",
        "6",
        "--compare-prompts",
        "6",
    ]
    base = ["--base", "nano", "--template", "plain", "--max-new-tokens", "6", "--overlong", "error", "--out", str(out)]
    assert main(["train", "dolly-finqa-lora", *base, *data, *size]) == 0
    output = " ".join(capsys.readouterr().err.split())
    assert "shortened the text of 6 FinQA rows to 192 tokens; their tables are complete" in output
    folder = out / "dolly-finqa-lora"
    found = json.loads((folder / "compare.json").read_text())
    inputs = [row["input"] for row in found["answers"] if "|" in row["input"]]
    assert any(ELLIPSIS in page for page in inputs)
    assert all("net loss | ( 3 ) | ( 2 )\nsee note 4 ." in page for page in inputs)
    assert found["scores"]["base"]["FinQA rows"] == len(inputs)
    for name in ("compare.md", "compare.html"):
        assert "FinQA exact match (%)" in (folder / name).read_text()
    assert main(["compare", str(folder), "--prompts", str(finqa), "--num-prompts", "2", "--max-new-tokens", "2"]) == 0
    assert "shortened the text of 2 FinQA prompts to 192 tokens" in " ".join(capsys.readouterr().err.split())
    assert main(["eval", "run", str(folder), "--num-generations", "6"]) == 0
    scores = json.loads((folder / "eval-6-generations.json").read_text())
    assert scores["held out"]["rows left out"] == 0
    assert scores["answers"]["FinQA exact match (%)"] == found["scores"]["tuned"]["FinQA exact match (%)"]
