"""Every method trains, saves and answers."""

import json
import math
from pathlib import Path

import pytest
import torch

import fgpt
from fgpt.cli import run_dir
from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.training.build import load_base
from fgpt.recipes import RECIPES

# ---------------------------------------------------------------------------------------------------- what it leaves


NANO = [name for name, make in RECIPES.items() if getattr(make(), "data", None) == ("nano",) and make().base == "nano"]  # pyright: ignore
METHODS = {name: [name] for name in NANO if name != "grpo-nano"} | {
    "bias": ["lora-nano", "--adapter.kind", "bias", "--adapter.target", r".*\.b", "--lr", "1e-2"],
    "dropout": ["lora-nano", "--adapter.dropout", "0.2"],
    "remat": ["qdora-nano", "--remat"],
}


@pytest.mark.slow
def test_every_method_trains_saves_and_answers(
    tmp_path: Path, instruction_file: Path, capsys: pytest.CaptureFixture[str]
):
    """They differ in what they train: the first loss, before any step, is the base's, and from then on they part."""
    losses = {}
    for name, args in METHODS.items():
        options = [
            "--steps",
            "3",
            "--micro-batch-size",
            "1",
            "--warmup-steps",
            "1",
            "--compare-prompts",
            "0",
            "--data",
            str(instruction_file),
            "--num-heldout",
            "4",
            "--out",
            str(tmp_path / name),
        ]
        assert main(["train", *args, *options]) == 0
        out = tmp_path / name / args[0]
        losses[name] = [m["loss"] for m in read_metrics(out / "metrics.jsonl")]
        run = run_dir.read_run(out)
        base = load_base(run)
        tokens = torch.randint(0, 4096, (2, 30), generator=fgpt.key(0))
        assert not torch.equal(fgpt.apply(run_dir.load_tuned(out, base), tokens), fgpt.apply(base, tokens))
        assert main(["generate", str(out), "Write a story about a fox.", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.strip()
    quantized = {name for name in METHODS if name.startswith("q") or name == "remat"}
    for names in (quantized, METHODS.keys() - quantized):
        first = [losses[name][0] for name in names]
        assert max(first) - min(first) < 1e-5
    assert losses["qlora-nano"][0] != losses["lora-nano"][0]
    assert losses["remat"] == pytest.approx(losses["qdora-nano"], abs=1e-5)
    ends = [losses[name][2] for name in METHODS if name != "remat"]
    assert len(set(ends)) == len(ends)


# ------------------------------------------------------------------------------------------------------- pretraining


@pytest.mark.slow
def test_pretraining_learns_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    stories = tmp_path / "stories.txt"
    output = [f"Once there was a fox named {name}. {name} ran home." for name in ("Tim", "Sue")]
    stories.write_text("\n<|endoftext|>\n".join(output))
    options = [
        "--data",
        str(stories),
        "--heldout",
        str(stories),
        "--steps",
        "60",
        "--warmup-steps",
        "5",
        "--micro-batch-size",
        "2",
    ]
    size = ["--n-layer", "1", "--n-head", "2", "--d-model", "32", "--max-seq-len", "32", "--no-compile"]
    assert main(["train", "pretrain-nano", *options, *size, "--lr", "1e-2", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "pretrain-nano" / "result.json").read_text())
    assert result["bits_per_character"] < 0.5 < math.log2(4096) / 4  # it knows its two stories by heart
    params = fgpt.load(str(tmp_path / "pretrain-nano" / "model"))
    assert params.cfg.n_layer == 1
    assert "Once" in capsys.readouterr().err
