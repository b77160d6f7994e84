"""Trainings whose results several files of tests examine."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
from builders.pretraining import SHORT_PRETRAINING, TINY_SIZE, output_of
from builders.resume import exit_status, final_files, run_in, run_in_fork

import fgpt
from fgpt.cli.main import main
from fgpt.io import models


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    at = tmp_path_factory.mktemp("texts")
    names = ["Tim", "Sue", "Max", "Ann", "Ben"]
    (at / "train.txt").write_text("\n<|endoftext|>\n".join(output_of(name, 2 + i) for i, name in enumerate(names)))
    (at / "held.txt").write_text(output_of("Tom", 9))
    return at / "train.txt", at / "held.txt"


@pytest.fixture(scope="session")
def pretrained_run(tmp_path_factory: pytest.TempPathFactory, texts: tuple[Path, Path]) -> Path:
    out = tmp_path_factory.mktemp("runs")
    data = ["--data", str(texts[0]), "--heldout", str(texts[1]), "--peak-tflops", "0.05", "--eval-every", "8"]
    assert main(["train", "tinytiny-pretrain", *data, *TINY_SIZE, *SHORT_PRETRAINING, "--out", str(out)]) == 0
    return out / "tinytiny-pretrain"


@pytest.fixture(scope="session")
def training_args(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The arguments of a small training of each kind, dropout, accumulation and 8-bit moments among them."""
    at = tmp_path_factory.mktemp("given")
    cfg = dataclasses.replace(fgpt.load("nano").cfg, n_layer=1, n_head=2, d_model=32, d_mlp=64, n_ctx=96)
    models.save(fgpt.init(cfg, fgpt.key(0)), at / "base", like="nano")
    rows = [{"instruction": f"Say {i}.", "output": f"The number is {i}. " * (1 + i % 3)} for i in range(30)]
    (at / "rows.json").write_text(json.dumps(rows))
    texts = [
        f"{('I am so glad', 'I am so sad', 'I fear it')[i % 3]} {i};{('joy', 'woe', 'fear')[i % 3]}" for i in range(40)
    ]
    (at / "texts.txt").write_text("\n".join(texts))
    (at / "tales.txt").write_text(
        "\n<|endoftext|>\n".join(f"Once there was a fox. It ran {i} miles." * 3 for i in range(12))
    )
    often = ["--checkpoint-every-minutes", "0", "--seed", "3"]
    base = [
        "--base",
        str(at / "base"),
        "--micro-batch-size",
        "1",
        "--grad-accumulation-steps",
        "2",
        "--max-seq-len",
        "64",
        *often,
    ]
    lora = ["--adapter.rank", "4", "--adapter.dropout", "0.2", "--adapter.target", r"blocks.*\.(q|up)|wte"]
    data = ["--data", str(at / "rows.json"), "--num-heldout", "4", "--compare-prompts", "2", "--max-new-tokens", "4"]
    best = ["--steps", "12", "--eval-every", "5", "--keep-best"]
    texts = ["--train", str(at / "texts.txt"), "--test", "None", "--num-heldout", "9", "--steps", "8"]
    tales = ["--data", str(at / "tales.txt"), "--tokenizer", "nano", "--no-compile", "--peak-tflops", "0.05"]
    size = ["--vocab", "4096", "--n-layer", "1", "--n-head", "2", "--d-model", "32", "--max-seq-len", "32"]
    steps = ["--micro-batch-size", "2", "--grad-accumulation-steps", "2", "--steps", "9", "--eval-every", "4"]
    timed = [
        "--checkpoint-every-minutes",
        "0.004",
        "--keep-checkpoints",
        "1",
        "--eval-every",
        "3",
    ]  # minutes: some steps have one, others none
    instruct = ["lora-nano", *base, "--optimizer", "adamw8bit", *lora, *data, *best]
    return {
        "timed": [*instruct, *timed],
        "instruct": instruct,
        "classify": ["emotion-small", *base, *texts],
        "pretrain": ["tinytiny-pretrain", *tales, *size, *steps, *often],
    }


@pytest.fixture(scope="session")
def undisturbed_results(
    training_args: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, Any], float]]:
    """Of each kind, what the training that nobody disturbs comes to, and how many seconds it takes."""
    found = {}
    for kind, args in training_args.items():
        out, began = tmp_path_factory.mktemp("whole") / kind, time.perf_counter()
        assert exit_status(run_in_fork(["train", *args, "--out", str(out)])) == 0
        found[kind] = final_files(out, kind == "timed"), time.perf_counter() - began
    return found


@pytest.fixture(scope="session")
def checkpointed_run(training_args: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    assert (
        exit_status(run_in_fork(["train", *training_args["instruct"], "--keep-checkpoints", "4", "--out", str(out)]))
        == 0
    )
    (run,) = run_in(out)
    return run
