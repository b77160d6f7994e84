"""Every message that docs/troubleshooting.md names is provoked here, by what it says brings it."""

import json
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from builders import ROOT
from filelock import FileLock

import fgpt
from fgpt.cli.main import main
from fgpt.io import models

PAGE = ROOT / "docs" / "troubleshooting.md"


def listed_messages() -> list[str]:
    """The messages, as the first column of the list has them."""
    return re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(), flags=re.M)


class Bench:
    """A tiny base, rows, and a finished training to spoil."""

    def __init__(self, at: Path) -> None:
        self.at, self.rows = at, at / "rows.json"
        cfg = replace(fgpt.load("nano").cfg, n_layer=1, n_head=2, d_model=16, d_mlp=16, n_ctx=64)
        models.save(fgpt.init(cfg, fgpt.key(0)), at / "base", like="nano")
        self.write([{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(12)])
        options = [
            "--base",
            str(at / "base"),
            "--data",
            str(self.rows),
            "--num-heldout",
            "2",
            "--steps",
            "3",
            "--max-seq-len",
            "48",
        ]
        self.args = ["lora-nano", *options, "--micro-batch-size", "2", "--compare-prompts", "0", "--out", str(at)]

    def write(self, rows: list[dict[str, str]]) -> None:
        self.rows.write_text(json.dumps(rows))

    def train(self, *more: str) -> int:
        return main(["train", *self.args, *more])

    def begin_run(self) -> Path:
        """A run that stopped half way."""
        assert self.train() == 0
        (self.at / "lora-nano" / "status.json").write_text('{"state": "interrupted", "steps": 3}\n')
        return self.at / "lora-nano"

    def resume(self, *more: str) -> int:
        return main(["train", "lora-nano", "--resume", "--out", str(self.at), *more])

    def train_classifier(self, text: str, *more: str) -> int:
        (self.at / "texts.txt").write_text(text)
        options = [
            "--base",
            str(self.at / "base"),
            "--train",
            str(self.at / "texts.txt"),
            "--test",
            "None",
            "--num-heldout",
            "2",
        ]
        return main(["train", "hate-smollm2-lora", *options, *more, "--out", str(self.at)])


def pickled_model(bench: Bench) -> int:
    (bench.at / "base" / "model.safetensors").unlink()
    (bench.at / "base" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return bench.train()


def long_row(bench: Bench) -> int:
    bench.write([{"instruction": "Say it.", "output": "word " * 90}] * 12)
    return bench.train()


def other_rows(bench: Bench) -> int:
    bench.begin_run()
    bench.write([{"instruction": f"Say {i}.", "output": f"It is not {i}."} for i in range(12)])
    return bench.resume()


def in_use(bench: Bench) -> int:
    with FileLock(bench.begin_run() / ".lock"):
        return bench.resume()


def full(bench: Bench) -> int:
    """The kernel refuses files of more than 20 kB, in a process of its own: the limit stays, and in a fork of this one
    torch would wait for threads that are not there.
    """

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, "-m", "fgpt", "train", *bench.args, "--device", "cpu"]
    return subprocess.run(command, preexec_fn=limit, check=False).returncode


def other_options(bench: Bench) -> int:
    bench.begin_run()
    return bench.resume("--lr", "1")


def without(name: str) -> Callable[[Bench], int]:
    def provoke(bench: Bench) -> int:
        with pytest.MonkeyPatch.context() as patch:
            from importlib import metadata

            def absent(package: str) -> metadata.Distribution:
                if package == name:
                    raise metadata.PackageNotFoundError(package)
                return found(package)

            found = metadata.distribution
            patch.setattr(metadata, "distribution", absent)
            return bench.train("--tracker", name)

    return provoke


TEXTS = "\n".join(f"text {i};{('hate', 'offensive', 'neutral')[i % 3]}" for i in range(12))

PROVOKED: dict[str, Callable[[Bench], int]] = {
    "no recipe named": lambda bench: main(["train", "lora-nan"]),
    "no trained run": lambda bench: main(["generate", "lora-none", "Hello."]),
    "the hub cannot be reached": lambda bench: bench.train("--base", "nobody/nothing-at-all"),
    "pickled weights may run any code and are not read": pickled_model,
    "matches no path": lambda bench: bench.train("--adapter.target", "transformer.*c_attn"),
    "tokens, the limit is": long_row,
    "expected one: give it another word": lambda bench: bench.train_classifier(
        TEXTS, "--labels", "hate=hatefulness", "offensive", "neutral"
    ),
    "has no training row": lambda bench: bench.train_classifier(
        TEXTS, "--labels", "hate", "offensive", "neutral", "sarcastic"
    ),
    "cannot be used": lambda bench: bench.train("--device", "cuda:77"),
    "the loss became": lambda bench: bench.train("--lr", "1e30", "--warmup-steps", "1", "--steps", "40"),
    "are not finite: nothing is saved": lambda bench: bench.train("--lr", "1e40", "--steps", "1"),
    "did not change in two steps": lambda bench: bench.train("--lr", "1e-30"),
    "nothing to resume": lambda bench: bench.resume(),
    "was started with": other_options,
    "was made from other inputs than there are now": other_rows,
    "is being trained in by another process": in_use,
    "free space": full,
    "is not installed, and this run uses it as a tracker": without("wandb"),
}


def test_the_list_is_the_readme_s():
    assert listed_messages() == list(PROVOKED)


@pytest.mark.parametrize("message", PROVOKED)
def test_the_message_comes_in_one_line(
    message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert PROVOKED[message](Bench(tmp_path)) == 2
    stderr = capfd.readouterr().err
    assert "Traceback" not in stderr
    assert message in [line for line in stderr.splitlines() if line.startswith("error: ")][-1]
