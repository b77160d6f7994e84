"""`--label-smoothing-factor` and `--teacher`: losses are torch's, resumes exact, and what does not fit is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import close, tiny
from builders.runs import copy_interrupted, one_line

import fgpt
from fgpt.cli.main import main
from fgpt.cli.options import parse
from fgpt.cli.tasks import build_job
from fgpt.recipes import InstructionRecipe, find
from fgpt.tree import astype, tree_map

OPTIONS = ["--steps", "4", "--micro-batch-size", "1", "--max-seq-len", "160", "--overlong", "cut"]
OPTIONS += ["--compare-prompts", "0"]
OFTEN = ["--eval-every", "4", "--checkpoint-every-minutes", "0", "--keep-checkpoints", "9"]
COMMAND = ["train", "lora-nano", *OPTIONS, *OFTEN]


def recipe(*options: str) -> InstructionRecipe:
    return parse(InstructionRecipe, [*OPTIONS, *options], find("lora-nano"), "fgpt train lora-nano")


def perturbed(params: fgpt.GPT) -> fgpt.GPT:
    """Another model with the same tokens."""
    noise = torch.Generator().manual_seed(3)
    return tree_map(lambda x: x + 0.05 * torch.randn(x.shape, generator=noise), params)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    fgpt.save(perturbed(fgpt.load("nano")), folder, like="nano")
    return folder


def first_step(options: list[str]) -> tuple[float, Any]:
    """The loss of the first step, and its batch."""
    job = build_job(recipe(*options))
    (batch,) = next(job.batches(0))
    return float(job.train_step(job.initial_state.take(), [batch], 0)[1].loss), batch


def flat_logits(params: fgpt.GPT, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The float64 logits and targets at the positions of the loss, all of weight 1."""
    chosen = batch.weights > 0
    assert set(batch.weights[chosen].tolist()) == {1.0}
    logits = fgpt.apply(astype(params, torch.float64), batch.tokens, segments=batch.segments)
    return logits[chosen], batch.targets[chosen]


def test_smoothed_targets_give_torchs_loss():
    loss, batch = first_step(["--label-smoothing-factor", "0.2"])
    expected = F.cross_entropy(*flat_logits(fgpt.load("nano"), batch), label_smoothing=0.2)
    close(torch.tensor(loss), expected.float(), 1e-5, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("ratio", "temperature"), [(0.5, 1.0), (0.3, 2.0), (1.0, 1.5)])
def test_a_teacher_gives_the_divergence_beside_the_nll(teacher: Path, ratio: float, temperature: float):
    loss, batch = first_step(
        ["--teacher", str(teacher), "--kd-ratio", str(ratio), "--kd-temperature", str(temperature)]
    )
    student, targets = flat_logits(fgpt.load("nano"), batch)
    taught, _ = flat_logits(fgpt.load(teacher), batch)
    log_q, log_p = ((x / temperature).log_softmax(-1) for x in (student, taught))
    divergence = temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    expected = ratio * divergence + (1 - ratio) * F.cross_entropy(student, targets)
    close(torch.tensor(loss), expected.float(), 1e-5, 1e-5)


def test_the_base_teaches_itself_nothing():
    job = build_job(recipe("--teacher", "nano", "--kd-ratio", "1"))
    state = job.initial_state.take()
    (batch,) = next(job.batches(0))
    metrics = job.train_step(state, [batch], 0)[1]
    assert abs(float(metrics.loss)) < 1e-5
    assert float(metrics.grad_norm) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["smoothing", "teacher"])
def test_a_resume_is_exact(kind: str, teacher: Path, tmp_path: Path):
    options = {"smoothing": ["--label-smoothing-factor", "0.1"], "teacher": ["--teacher", str(teacher)]}[kind]
    assert main([*COMMAND, *options, "--out", str(tmp_path)]) == 0
    whole, resumed = tmp_path / "lora-nano", tmp_path / "again" / "lora-nano"
    copy_interrupted(whole, resumed, after=2)
    assert main(["train", str(resumed), "--resume", "--out", str(resumed.parent)]) == 0
    last = [path / "checkpoints" / "step-000004" / "state.safetensors" for path in (whole, resumed)]
    assert last[0].read_bytes() == last[1].read_bytes()


@pytest.mark.slow
def test_the_held_out_loss_stays_the_nll(teacher: Path):
    options = (["--label-smoothing-factor", "0.1"], ["--teacher", str(teacher)], [])
    jobs = [build_job(recipe("--eval-every", "2", *each)) for each in options]
    losses = {job.eval_losses["heldout_loss"](job.initial_state.peek().trainable) for job in jobs}
    assert len(losses) == 1


@pytest.mark.slow
def test_another_teacher_is_another_training(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*COMMAND, "--teacher", str(teacher), "--out", str(tmp_path)]) == 0
    resumed = tmp_path / "again" / "lora-nano"
    copy_interrupted(tmp_path / "lora-nano", resumed, after=2)
    params, config = fgpt.load(teacher), teacher / "config.json"
    written = config.read_text()
    fgpt.save(perturbed(params), teacher, like="nano")
    for change in ("weights", "config"):  # other weights, then the former ones in a model of other heads
        capsys.readouterr()
        assert main(["train", str(resumed), "--resume", "--out", str(resumed.parent)]) != 0
        assert "teacher" in capsys.readouterr().err, change
        fgpt.save(params, teacher, like="nano")
        config.write_text(json.dumps(json.loads(written) | {"n_head": 8}))
    config.write_text(written)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kd-ratio", "0.7"], "are of distillation: give a --teacher"),
        (["--teacher", "nano", "--label-smoothing-factor", "0.1"], "leave one of them out"),
        (["--teacher", "nano", "--new-tokens", "<|a|>"], "does not know --new-tokens"),
        (["--teacher", "nowhere/at-all/x"], "no such model folder"),
        (["--teacher", "nano", "--kd-ratio", "0"], "--kd-ratio is 0"),
    ],
)
def test_what_does_not_fit_is_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "lora-nano", *OPTIONS, *options]) != 0
    assert message in one_line(capsys)


def test_a_teacher_of_other_tokens_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """As many tokens, two of which have changed places; and a context that is too short."""
    params = fgpt.load("nano")
    fgpt.save(params, tmp_path / "model", like="nano")
    ranks = tmp_path / "model" / "ranks.tiktoken"
    lines = ranks.read_text().splitlines()
    (first, rank), (second, other) = lines[300].split(), lines[301].split()
    ranks.write_text("\n".join([*lines[:300], f"{second} {rank}", f"{first} {other}", *lines[302:]]) + "\n")
    assert main(["train", "lora-nano", *OPTIONS, "--teacher", str(tmp_path / "model")]) != 0
    assert "it has 4,096 others" in one_line(capsys)
    small = tiny(vocab_size=params.cfg.vocab_size, n_ctx=64)
    fgpt.save(small, tmp_path / "short", like="nano")
    assert main(["train", "lora-nano", *OPTIONS, "--teacher", str(tmp_path / "short")]) != 0
    assert "has a context of 64 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["grpo-nano", "dpo-nano"])
def test_other_recipes_do_not_take_them(name: str, capsys: pytest.CaptureFixture[str]):
    assert main(["train", name, "--base", "nano", "--label-smoothing-factor", "0.1"]) != 0
    assert one_line(capsys).endswith("--label-smoothing-factor is of instruction tuning: leave it out")
