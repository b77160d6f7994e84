"""Runs that the tests of the command line share."""

import dataclasses
import json
from pathlib import Path

import pytest
from builders.command_line import ODD_NAME, training_options
from builders.runs import SHORT_TRAINING

import fgpt
import fgpt.cli.tasks.instruction_tuning
import fgpt.cli.training.build
import fgpt.cli.training.step_log
from fgpt.cli.main import main
from fgpt.io import models


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, rows, labeled texts, and a run of each kind that is trained on them."""
    at = tmp_path_factory.mktemp(ODD_NAME.replace("/", "|"))
    cfg = dataclasses.replace(fgpt.load("nano").cfg, n_layer=1, n_head=2, d_model=16, d_mlp=16, n_ctx=96)
    models.save(fgpt.init(cfg, fgpt.key(0)), at / "base", like="nano")
    rows = [{"instruction": f"Say {i} {ODD_NAME}.", "output": f"It is {i} {ODD_NAME}."} for i in range(24)]
    (at / "rows.json").write_text(json.dumps(rows))
    texts = [f"it is {i},{('[pos]', '[/neg]')[i % 2]}" for i in range(24)]
    (at / "texts.csv").write_text("\n".join(["text,label", *texts, ""]))
    assert (
        main(["train", *training_options(at), "--name", "it[b]", "--compare-prompts", "2", "--max-new-tokens", "3"])
        == 0
    )
    labels = ["--base", str(at / "base"), "--train", str(at / "texts.csv"), "--test", "None", "--num-heldout", "6"]
    labels += ["--steps", "2", "--name", "told[b]", "--out", str(at / "runs")]
    assert main(["train", "emotion-small", *labels]) == 0
    return at


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    assert main(["train", "lora-nano", *SHORT_TRAINING, "--warmup-steps", "1", "--out", str(out)]) == 0
    return out / "lora-nano"


@pytest.fixture(scope="session")
def instruction_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.json"
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"The number is {i}."} for i in range(24)]
    path.write_text(json.dumps(rows))
    return path
