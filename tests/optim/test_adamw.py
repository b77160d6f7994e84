"""Optimizers and schedules are torch's and transformers'."""

import math
from typing import Any

import pytest
import torch
from builders import close
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

import fgpt
from fgpt.optim import clip_factor, constant_schedule, cosine_schedule, global_norm, linear_schedule
from fgpt.tree import tree_map

TREE = {"w": torch.randn(3, 4, generator=fgpt.key(0)), "b": torch.randn(4, generator=fgpt.key(1))}
TREE["head.w"] = torch.randn(2, 3, generator=fgpt.key(2))


def gradients(step: int) -> dict[str, Tensor]:
    """Of very unequal sizes, and now and then zero."""
    rng = fgpt.key(step)
    return {
        name: (step % 5) * 10.0 ** (i - 2) * torch.randn(x.shape, generator=rng)
        for i, (name, x) in enumerate(TREE.items())
    }


@pytest.mark.parametrize(
    ("betas", "eps", "decay", "pattern", "decayed"),
    [
        ((0.9, 0.999), 1e-8, 0.0, ".*", []),
        ((0.9, 0.999), 1e-8, 0.1, ".*", ["w", "head.w"]),  # never the bias
        ((0.8, 0.95), 1e-4, 0.5, r"head\..*", ["head.w"]),
    ],
)
def test_adamw_is_torchs(betas: tuple[float, float], eps: float, decay: float, pattern: str, decayed: list[str]):
    hf = {name: x.clone().requires_grad_() for name, x in TREE.items()}
    groups = [
        {"params": [x for n, x in hf.items() if n in decayed], "weight_decay": decay},
        {"params": [x for n, x in hf.items() if n not in decayed], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW([g for g in groups if g["params"]], lr=3e-2, betas=betas, eps=eps)
    optimizer = fgpt.adamw(3e-2, betas, eps=eps, weight_decay=decay, decay=pattern)
    params, state = TREE, optimizer.init(TREE)
    for step in range(20):
        grads = gradients(step)
        for name, x in hf.items():
            x.grad = grads[name].clone()
        reference.step()
        params, state = optimizer.update(grads, state, params)
        close(params, {name: x.detach() for name, x in hf.items()}, 1e-6)
    assert state.count == 20
    assert (params["w"] - TREE["w"]).abs().max() > 0.1


def test_adamw_follows_a_schedule():
    schedule = cosine_schedule(1e-2, 10, warmup_steps=3)
    hf = TREE["w"].clone().requires_grad_()
    reference = torch.optim.AdamW([hf], lr=1.0, weight_decay=0.1)
    scheduler = LambdaLR(reference, lambda step: schedule(torch.tensor(step)).item())
    optimizer = fgpt.adamw(schedule, weight_decay=0.1)
    params, state = {"w": TREE["w"]}, optimizer.init({"w": TREE["w"]})
    for step in range(10):
        hf.grad = gradients(step)["w"]
        reference.step()
        scheduler.step()
        params, state = optimizer.update({"w": gradients(step)["w"]}, state, params)
    close(params["w"], hf.detach(), 1e-6)


def factors(schedule: Any, steps: int) -> list[float]:
    return [schedule(torch.tensor(step)).item() for step in range(steps)]


def test_schedules_worked_by_hand():
    assert factors(constant_schedule(2.0, warmup_steps=4), 6) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert factors(constant_schedule(2.0), 2) == [2.0, 2.0]
    assert factors(linear_schedule(1.0, 4), 6) == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert factors(linear_schedule(1.0, 6, warmup_steps=2, final_lr=0.5), 7) == pytest.approx(
        [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5]
    )
    half = math.sqrt(0.5) / 2
    assert factors(cosine_schedule(1.0, 4), 6) == pytest.approx([1.0, 0.5 + half, 0.5, 0.5 - half, 0.0, 0.0], abs=1e-6)
    assert factors(cosine_schedule(1.0, 4, final_lr=0.2), 5)[2:] == pytest.approx(
        [0.6, 0.6 - 0.8 * half, 0.2], abs=1e-6
    )


@pytest.mark.parametrize("warmup", [0, 5])
def test_schedules_are_transformers_after_the_warmup(warmup: int):
    """Theirs begins at 0, which trains nothing in the first step; ours at 1/warmup. From the peak on they coincide."""
    for schedule, make in (
        (linear_schedule, get_linear_schedule_with_warmup),
        (cosine_schedule, get_cosine_schedule_with_warmup),
    ):
        scheduler = make(torch.optim.SGD([torch.zeros(1)], lr=3.0), warmup, 20)
        expected = [scheduler.lr_lambdas[0](step) * 3.0 for step in range(21)]
        got = factors(schedule(3.0, 20, warmup_steps=warmup), 21)
        assert got[warmup:] == pytest.approx(expected[warmup:], abs=1e-6)
        assert got[:warmup] == pytest.approx([3.0 * (step + 1) / warmup for step in range(warmup)])


@pytest.mark.parametrize("most", [0.1, 1.0, 1e3])
def test_clipping_is_torchs(most: float):
    grads = gradients(3)
    reference = {name: torch.zeros_like(x).requires_grad_() for name, x in grads.items()}
    for name, x in reference.items():
        x.grad = grads[name].clone()
    norm = torch.nn.utils.clip_grad_norm_(list(reference.values()), most)
    close(global_norm(grads), norm, 1e-6, 1e-6)
    factor = clip_factor(global_norm(grads), most)
    close(tree_map(lambda g: g * factor, grads), {name: x.grad for name, x in reference.items()}, 1e-6, 1e-6)
    assert (most < norm) == (factor < 1)
