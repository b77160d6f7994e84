"""Training with compiled blocks: what is not compiled is one line, and a step is the same in every process."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from builders import ROOT

import fgpt
from fgpt.cli.main import main
from fgpt.io import models


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Of a training of a tiny base: one adapted matrix, and micro-batches of several widths."""
    cfg = replace(fgpt.load("nano").cfg, n_layer=2, n_head=2, d_model=16, d_mlp=16, n_ctx=96)
    models.save(fgpt.init(cfg, fgpt.key(0)), tmp_path / "base", like="nano")
    target = ["--adapter.rank", "2", "--adapter.target", r"blocks\.1\.attn\.q"]
    size = ["--max-seq-len", "96", "--micro-batch-size", "2", "--overlong", "drop", "--steps", "3"]
    where = ["--base", str(tmp_path / "base"), "--out", str(tmp_path), "--checkpoint-every-minutes", "0"]
    return ["lora-nano", *where, *size, *target, "--compare-prompts", "0", "--compile"]


@pytest.mark.slow
def test_what_is_not_compiled_is_one_line(options: list[str], capsys: pytest.CaptureFixture[str]):
    """The checks that the tests put on all of fgpt are what a compiler cannot trace."""
    assert main(["train", *options]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == 1
    assert lines[0].startswith("warning: the transformer block runs uncompiled: ")


@pytest.mark.slow
def test_another_process_computes_the_same_step(options: list[str], tmp_path: Path):
    """A replay begins with another batch than the training did, and compiles its own program."""

    def run(*args: str, cache: str) -> None:
        command = [sys.executable, "-m", "fgpt", *args]
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / cache), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "uncompiled" not in done.stderr

    run("train", *options, cache="first")
    run("replay", str(tmp_path / "lora-nano"), "--step", "3", cache="second")
