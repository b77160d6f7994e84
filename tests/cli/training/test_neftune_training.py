"""`--neftune-noise-alpha`: the noise is of training, drawn anew in each step, and the same after a resume."""

from pathlib import Path

import pytest
from builders.runs import copy_interrupted

from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics

COMMAND = ["train", "lora-nano", "--steps", "4", "--micro-batch-size", "1", "--max-seq-len", "160", "--overlong", "cut"]
COMMAND += ["--compare-prompts", "0", "--eval-every", "4", "--checkpoint-every-minutes", "0", "--keep-checkpoints", "9"]
NOISE = ["--neftune-noise-alpha", "5"]


def losses(out: Path, name: str) -> list[float]:
    return [line[name] for line in read_metrics(out / "lora-nano" / "metrics.jsonl") if name in line]


@pytest.mark.slow
def test_noise_is_of_training_and_resumes_to_the_bit(tmp_path: Path):
    for name, options in (("noisy", NOISE), ("plain", [])):
        assert main([*COMMAND, *options, "--out", str(tmp_path / name)]) == 0
    assert losses(tmp_path / "noisy", "loss")[0] != losses(tmp_path / "plain", "loss")[0]
    whole, resumed = tmp_path / "noisy" / "lora-nano", tmp_path / "resumed" / "lora-nano"
    copy_interrupted(whole, resumed, after=2)
    assert main(["train", str(resumed), "--resume", "--out", str(resumed.parent)]) == 0
    last = [path / "checkpoints" / "step-000004" / "state.safetensors" for path in (whole, resumed)]
    assert last[0].read_bytes() == last[1].read_bytes()


def test_a_policy_that_samples_has_no_noise(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "grpo-nano", *NOISE]) != 0
    assert "--neftune-noise-alpha changes the policy" in capsys.readouterr().err
