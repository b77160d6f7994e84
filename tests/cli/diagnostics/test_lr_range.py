"""`fgpt lr-range`: each rate's losses are those of a training of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny, tokens
from builders.command_line import training_options

import fgpt
from fgpt.cli.main import main
from fgpt.range_test import moving_average, suggest_lr
from fgpt.tree import astype

BASE = astype(tiny(n_layer=1), torch.float64)
BATCHES = [
    [fgpt.Batch(tokens(31, 2, 8, seed=i), tokens(31, 2, 8, seed=i + 1), torch.ones(2, 8)) for i in (j, j + 9)]
    for j in range(4)
]
ADAPTERS = astype(fgpt.lora(BASE, fgpt.key(0), 2, dropout=0.2), torch.float64)


def loss(adapters: Any, params: Any, batch: fgpt.Batch, seed: Any) -> Any:
    return fgpt.nll(fgpt.adapt(params, adapters, rng=seed), batch)


@pytest.mark.slow
@pytest.mark.parametrize("make", [fgpt.adamw, fgpt.muon, fgpt.schedule_free_adamw])
def test_each_rate_is_a_training_of_its_own(make: Any):
    lrs = torch.tensor([1e-4, 1e-2, 1e-1], dtype=torch.float64)
    start = fgpt.init_state(ADAPTERS, make(0.0))
    result = fgpt.lr_range(lambda lr: fgpt.make_step(loss, make(lr)), start, BASE, BATCHES, lrs=lrs, rng=fgpt.key(5))
    assert result.losses.shape == (3, 4)
    for lr, got in zip(lrs.tolist(), result.losses, strict=True):
        step, state, losses = fgpt.make_step(loss, make(lr)), start, []
        for i, batches in enumerate(BATCHES):
            state, metrics = step(state, BASE, batches, fgpt.fold_in(fgpt.key(5), i))
            losses.append(float(metrics.loss))
        assert got.tolist() == pytest.approx(losses, rel=1e-6)


def test_the_average_by_hand():
    got = moving_average(torch.tensor([[2.0, 4.0, 8.0]]), 0.5)
    assert got[0].tolist() == pytest.approx([2.0, (1 / 2 + 2) / 0.75, (1 / 4 + 1 + 4) / 0.875])


@pytest.mark.parametrize(
    ("ends", "suggestion"),
    [
        ([3.0, 2.5, 2.0, 2.2], 1e-2),  # the lowest, none diverges
        ([3.0, 2.5, 2.0, 9.0], 1e-2),  # the next one diverges: at most a third of it
        ([3.0, 2.5, float("nan"), 2.0], 1e-2 / 3 if 1e-2 / 3 < 1e-3 else 1e-3),
        ([3.0, 3.5, 4.0, 5.0], None),
        ([3.0, 3.01, 3.01, 3.02], None),
    ],
)
def test_suggestions(ends: list[float], suggestion: float | None):
    lrs = torch.tensor([1e-4, 1e-3, 1e-2, 1e-1], dtype=torch.float64)
    losses = torch.tensor([[3.0, end] for end in ends])
    assert suggest_lr(lrs, losses, losses) == (suggestion if suggestion is None else pytest.approx(suggestion))


def test_a_rate_near_a_divergent_one_is_lowered():
    lrs, losses = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([[3.0, 3.0], [3.0, 2.0], [3.0, 9.0]])
    assert suggest_lr(lrs, losses, losses) == pytest.approx(4 / 3)


@pytest.mark.parametrize("lrs", [[1e-3], [1e-2, 1e-3], [0.0, 1e-3]])
def test_bad_rates(lrs: list[float]):
    start = fgpt.init_state(ADAPTERS, fgpt.adamw(0.0))
    with pytest.raises(fgpt.InputError, match="expected two or more above 0, in rising order"):
        fgpt.lr_range(lambda lr: fgpt.make_step(loss, fgpt.adamw(lr)), start, BASE, BATCHES, lrs=torch.tensor(lrs))


@pytest.mark.slow
def test_the_command(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture = tmp_path / "picture.png"
    options = [*training_options(project), "--num-lrs", "4", "--num-steps=3", "--picture", str(picture)]
    assert main(["lr-range", *options, "--min-lr", "1e-4", "--optimizer", "muon"]) == 0
    output = " ".join(capsys.readouterr().err.split())
    assert "0.0001" in output
    assert "4 learning rates" in output
    assert picture.read_bytes().startswith(b"\x89PNG")
    for bad, says in (
        (["--min-lr", "1"], "--min-lr 1 is not below --max-lr 0.1"),
        (["--num-lrs", "1"], "--num-lrs is 1: expected 2 or more"),
        (["--num-steps"], "--num-steps"),
        (["--nonsense", "1"], "no option --nonsense"),
    ):
        assert main(["lr-range", *training_options(project), *bad]) == 2
        assert says in capsys.readouterr().err
    assert main(["lr-range"]) == 2
    assert "fgpt lr-range RECIPE" in capsys.readouterr().err
