"""A training, end to end: what it leaves, and what answers from it."""

import json
from pathlib import Path

import pytest
import torch
from builders.runs import SHORT_TRAINING

import fgpt
from fgpt.cli import run_dir
from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.recipes import InstructionRecipe, find


def test_a_run_leaves_all_it_promises(lora_run: Path):
    names = {p.name for p in lora_run.iterdir()}
    assert names == {
        *("run.json", "status.json", "environment.json", ".lock", "metrics.jsonl", "tensorboard", "loss.png"),
        *("checkpoints", "adapter", "compare.md", "compare.html", "compare.json"),
    }
    metrics = read_metrics(lora_run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert all(m["memory_gb"] > 0 and m["tokens"] > 0 for m in metrics)
    assert (lora_run / "loss.png").read_bytes().startswith(b"\x89PNG")
    compared = json.loads((lora_run / "compare.json").read_text())
    assert len(compared["answers"]) == 4
    assert compared["scores"]["tuned"].keys() == compared["scores"]["base"].keys()
    page, text = (lora_run / "compare.html").read_text(), (lora_run / "compare.md").read_text()
    for row in compared["answers"]:
        assert " ".join(row["instruction"].split()) in text
    assert page.count("<tr>") > 4


def test_the_resolved_run_reads_back(lora_run: Path):
    run = run_dir.read_run(lora_run)
    assert isinstance(run, InstructionRecipe)
    assert (run.steps, run.micro_batch_size, run.max_new_tokens, run.base) == (6, 2, 24, "nano")
    assert run.adapter == find("lora-nano").adapter  # pyright: ignore[reportAttributeAccessIssue]


def test_the_adapter_is_peft_s(lora_run: Path):
    import peft
    import transformers

    from fgpt.io import models

    base = transformers.GPT2LMHeadModel.from_pretrained(models.EMBEDDED["nano"], dtype=torch.float64)
    reference = peft.PeftModel.from_pretrained(base, lora_run / "adapter").double().eval()
    tokens, nano = torch.randint(0, 4096, (2, 30), generator=fgpt.key(0)), fgpt.load("nano", torch.float64)
    ours = fgpt.apply(run_dir.load_tuned(lora_run, nano), tokens)
    torch.testing.assert_close(reference(tokens).logits, ours, atol=1e-9, rtol=0)
    assert not torch.equal(ours, fgpt.apply(nano, tokens))


@pytest.mark.slow
def test_generate_and_compare_again(lora_run: Path, capsys: pytest.CaptureFixture[str]):
    before = (lora_run / "compare.json").read_text()
    assert main(["generate", str(lora_run), "Write a story about a fox named Tim.", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["compare", str(lora_run)]) == 0
    assert (lora_run / "compare.json").read_text() == before  # greedy: the same again, from the files alone


@pytest.mark.slow
def test_full_tuning_leaves_a_model(tmp_path: Path, instruction_file: Path):
    options = ["--adapter.kind", "full", "--adapter.target", ".*", "--lr", "1e-4", "--num-heldout", "4"]
    assert (
        main(["train", "lora-nano", *options, *SHORT_TRAINING, "--data", str(instruction_file), "--out", str(tmp_path)])
        == 0
    )
    saved = fgpt.load(str(tmp_path / "lora-nano" / "model"))
    base = fgpt.load("nano")
    assert not torch.equal(saved.blocks[0].attn.q.w, base.blocks[0].attn.q.w)  # pyright: ignore
    assert saved.cfg == base.cfg
