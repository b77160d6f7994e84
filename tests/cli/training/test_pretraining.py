"""Pretraining learns, and its model serves full tuning and LoRA alike."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.pretraining import TINY_SIZE

import fgpt
from fgpt.cli import run_dir
from fgpt.cli.evaluation.compare import contenders as compare_sides
from fgpt.cli.inference.generation import LoadedRun, encode_conversation
from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.tasks.pretraining import figures, heldout_perplexity
from fgpt.cli.training import mfu
from fgpt.cli.training.examples import load_heldout_rows
from fgpt.data.documents import read as read_documents
from fgpt.data.prompt_templates import InstructionRow, encode, encode_prompt, template
from fgpt.evaluation import likelihood
from fgpt.evaluation.likelihood import loglikelihood_rolling, perplexity
from fgpt.io import models
from fgpt.optim import cosine_schedule
from fgpt.recipes import find
from fgpt.tokenizers.tiktoken_bpe import RANKS, from_ranks

NANO = from_ranks(models.EMBEDDED["nano"] / RANKS)


# --------------------------------------------------------------------------------------------------------- the training


def test_the_schedule_falls_to_its_floor_as_torchs_does():
    run: Any = find("tinytiny-pretrain")
    schedule = cosine_schedule(run.lr, 50, warmup_steps=10, final_lr=run.lr * run.min_lr_ratio)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=6e-4)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=6e-5)
    ours = [float(schedule(torch.tensor(step))) for step in range(60)]
    assert ours[:10] == pytest.approx([6e-5 * (step + 1) for step in range(10)])
    for step in range(41):
        assert ours[10 + step] == pytest.approx(reference.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        reference.step()
    assert ours[30] == pytest.approx(3.3e-4)  # half way
    assert ours[50:] == pytest.approx([6e-5] * 10)


def test_it_learns_and_says_so(pretrained_run: Path, texts: tuple[Path, Path]):
    metrics, result = (
        read_metrics(pretrained_run / "metrics.jsonl"),
        json.loads((pretrained_run / "result.json").read_text()),
    )
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 1
    assert [m["step"] for m in metrics if "heldout_loss" in m] == [8, 16]
    assert result["perplexity"] < 0.2 * result["before"]["perplexity"]
    assert result["before"]["loss"] == pytest.approx(math.log(4100), abs=0.1)  # it knew nothing
    assert 1e-3 < metrics[-1]["lr"] < 1.2e-3 < metrics[0]["lr"]  # a tenth of the peak is left
    assert [m["tokens"] for m in metrics] == [2 * 3 * 64 * n for n in range(1, 17)]
    params = fgpt.load(str(pretrained_run / "model"))
    before, last = metrics[-2:]
    speed = (last["tokens"] - before["tokens"]) / (last["seconds"] - before["seconds"])
    assert last["mfu"] == pytest.approx(speed * mfu.flops(params, 64) / 0.05e12, rel=0.1)  # seconds are rounded
    assert last["heldout_loss"] == pytest.approx(result["loss"], abs=1e-2)  # saved in fp16
    tokenizer = fgpt.tokenizer(str(pretrained_run / "model"))
    text = read_documents(texts[1])
    assert figures(heldout_perplexity(params, tokenizer, text, 8), text) == pytest.approx(
        {name: x for name, x in result.items() if name not in ("before", "heldout_documents")}, rel=1e-4
    )


def test_held_out_figures_are_the_evaluations(pretrained_run: Path, texts: tuple[Path, Path], capsys: Any):
    params, text = fgpt.load(str(pretrained_run / "model")), read_documents(texts[1])[0]
    ended = loglikelihood_rolling(
        params, [*NANO.encode(text), NANO.eos_token_id], bos_token_id=NANO.bos_token_id, stride=64
    )
    of = heldout_perplexity(params, NANO, [text], 8)
    assert of.nats == pytest.approx(-math.fsum(ended.logprobs), rel=1e-5)
    assert (of.bytes, of.words) == perplexity([-1.0], text)[2:]
    two = heldout_perplexity(params, NANO, [text, text], 3)
    assert (two.loss, two.bits_per_byte) == pytest.approx((of.loss, of.bits_per_byte), rel=1e-5)
    assert main(["eval", "text", str(texts[1]), "--base", str(pretrained_run / "model")]) == 0
    assert "word perplexity" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- as a base for SFT


@pytest.fixture(scope="module")
def tuned_runs(tmp_path_factory: pytest.TempPathFactory, pretrained_run: Path) -> tuple[Path, Path]:
    at = tmp_path_factory.mktemp("sft")
    rows = [{"instruction": f"Say {i}.", "output": f"The number is {i}. " * (i % 9 + 1)} for i in range(40)]
    (at / "rows.json").write_text(json.dumps(rows))
    options = [
        "--base",
        str(pretrained_run / "model"),
        "--data",
        str(at / "rows.json"),
        "--out",
        str(at),
        "--steps",
        "2",
    ]
    small = [
        "--micro-batch-size",
        "2",
        "--num-heldout",
        "8",
        "--warmup-steps",
        "1",
        "--compare-prompts",
        "0",
        "--max-new-tokens",
        "6",
    ]
    for name in ("tinytiny-sft-full", "tinytiny-sft-lora"):
        assert main(["train", name, *options, *small]) == 0
    return at / "tinytiny-sft-full", at / "tinytiny-sft-lora"


def test_a_pretrained_model_serves_full_tuning_and_lora_alike(tuned_runs: tuple[Path, Path], capsys: Any):
    full, lora = (read_metrics(at / "metrics.jsonl") for at in tuned_runs)
    assert full[0]["loss"] == pytest.approx(lora[0]["loss"], abs=1e-5)  # the same rows over the same base
    assert [m["weight"] for m in full] == [m["weight"] for m in lora]
    assert [m["tokens"] for m in full] == [m["tokens"] for m in lora]
    assert (tuned_runs[0] / "model").is_dir()
    assert (tuned_runs[1] / "adapter").is_dir()
    assert main(["compare", str(tuned_runs[0]), str(tuned_runs[1]), "--num-prompts", "3"]) == 0
    found = json.loads(
        (tuned_runs[0].parent / "compare-tinytiny-sft-full-tinytiny-sft-lora" / "compare.json").read_text()
    )
    assert list(found["scores"]) == ["base", "tinytiny-sft-full", "tinytiny-sft-lora"]
    assert main(["generate", str(tuned_runs[1]), "Say 3.", "--max-new-tokens", "3"]) == 0


def test_training_generation_and_evaluation_use_one_prompt(
    tuned_runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
):
    run, row = run_dir.read_run(tuned_runs[0]), InstructionRow("Name a fox.", "", "Tim.")
    assert run.template == "tulu"
    text = "<|user|>\nName a fox.\n<|assistant|>\n"
    prompt = encode_prompt(row, template("tulu"), NANO)
    assert NANO.decode(list(prompt)) == text
    example = encode(row, template("tulu"), NANO)
    assert example.tokens[: example.prompt_length] == prompt
    assert NANO.decode(list(example.tokens)) == text + "Tim.<|endoftext|>"
    assert compare_sides.encode_prompts(compare_sides.Contender("base", run), [row], NANO) == [prompt]
    params = fgpt.load(run.base)
    assert encode_conversation(LoadedRun(run, params, NANO), [InstructionRow("Name a fox.")]) == list(prompt)
    read: list[list[int]] = []

    def record(p: fgpt.GPT, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        read.extend(x.tolist())
        return fgpt.hidden_at(p, x, positions)

    monkeypatch.setattr(likelihood, "hidden_at", record)
    assert main(["eval", "run", str(tuned_runs[0])]) == 0
    prompts = [list(encode_prompt(each, template("tulu"), NANO)) for each in load_heldout_rows(run)]
    assert 4 <= len(read) <= len(prompts) == 8  # rows longer than the context are left out
    assert all(any(x[: len(prompt)] == prompt for prompt in prompts) for x in read)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "missing.txt"], "missing.txt: expected a text in UTF-8"),
        (["--data", "empty.txt"], "empty.txt: holds no text"),
        (["--data", "bytes.txt"], "bytes.txt: expected a text in UTF-8"),
        (["--data", "one.txt"], "the text is one word: nothing of it can be held out; give --heldout FILE"),
        (["--data", "one.txt", "--heldout", "missing.txt"], "missing.txt: expected a text"),
        (["--max-seq-len", "1"], "--max-seq-len is 1: expected 2 or more"),
        (["--steps", "0"], "steps is 0: expected 1 or more"),
        (["--grad-accumulation-steps", "0"], "--grad-accumulation-steps is 0: expected 1 or more"),
        (["--eval-every", "0"], "--eval-every is 0: expected 1 or more"),
        (["--peak-tflops", "0"], "--peak-tflops is 0.0: expected a number above 0"),
        (["--vocab", "4000"], "vocab is 4000: expected a row for each of the 4096 tokens, or more"),
        (["--n-head", "5"], "does not divide into 5 heads"),
        (["--source", "wikipedia"], "wikipedia"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    ],
)
def test_bad_input_is_one_line(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n<|endoftext|>\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "one.txt").write_text("Once.")
    assert main(["train", "tinytiny-pretrain", *TINY_SIZE, *args]) == 2
    output = capsys.readouterr().err.strip().splitlines()
    assert len(output) == 1, output
    assert output[0].startswith("error: ")
    assert message in output[0]
    assert not (tmp_path / "runs").exists()


def test_tuning_wants_the_pretrained_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "a", "output": "b"}] * 120))
    assert main(["train", "tinytiny-sft-lora", "--data", "rows.json"]) == 2
    assert "runs/tinytiny-pretrain/model: no such model folder" in capsys.readouterr().err
