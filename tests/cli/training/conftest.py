"""Trainings whose results several files of tests examine."""

from pathlib import Path

import pytest
from builders.pretraining import SHORT_PRETRAINING, TINY_SIZE, output_of

from fgpt.cli.main import main


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    at = tmp_path_factory.mktemp("texts")
    names = ["Tim", "Sue", "Max", "Ann", "Ben"]
    (at / "train.txt").write_text("\n<|endoftext|>\n".join(output_of(name, 2 + i) for i, name in enumerate(names)))
    (at / "held.txt").write_text(output_of("Tom", 9))
    return at / "train.txt", at / "held.txt"


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory, texts: tuple[Path, Path]) -> Path:
    out = tmp_path_factory.mktemp("runs")
    data = ["--data", str(texts[0]), "--heldout", str(texts[1]), "--peak-tflops", "0.05", "--eval-every", "8"]
    assert main(["train", "tinytiny-pretrain", *data, *TINY_SIZE, *SHORT_PRETRAINING, "--out", str(out)]) == 0
    return out / "tinytiny-pretrain"
