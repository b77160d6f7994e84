"""Optimizers against torch's, steps that are pure and add up exactly, and an import that changes nothing."""

import itertools
import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from builders import ROOT, close, same, tiny, tokens, with_noise
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

import fgpt
from fgpt.optim import clip_by_global_norm, constant_schedule, cosine_schedule, global_norm, linear_schedule
from fgpt.tree import astype, leaves, tree_map
from fgpt.weights import Adapted

TREE = {"w": torch.randn(3, 4, generator=fgpt.key(0)), "b": torch.randn(4, generator=fgpt.key(1))}
TREE["head.w"] = torch.randn(2, 3, generator=fgpt.key(2))


def gradients(step: int) -> dict[str, Tensor]:
    """Of very unequal sizes, and now and then zero."""
    rng = fgpt.key(step)
    return {
        name: (step % 5) * 10.0 ** (i - 2) * torch.randn(x.shape, generator=rng)
        for i, (name, x) in enumerate(TREE.items())
    }


# ---------------------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize(
    ("betas", "eps", "decay", "pattern", "decayed"),
    [
        ((0.9, 0.999), 1e-8, 0.0, ".*", []),
        ((0.9, 0.999), 1e-8, 0.1, ".*", ["w", "head.w"]),  # never the bias
        ((0.8, 0.95), 1e-4, 0.5, r"head\..*", ["head.w"]),
    ],
)
def test_adamw_is_torchs(betas: tuple[float, float], eps: float, decay: float, pattern: str, decayed: list[str]):
    theirs = {name: x.clone().requires_grad_() for name, x in TREE.items()}
    groups = [
        {"params": [x for n, x in theirs.items() if n in decayed], "weight_decay": decay},
        {"params": [x for n, x in theirs.items() if n not in decayed], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW([g for g in groups if g["params"]], lr=3e-2, betas=betas, eps=eps)
    optimizer = fgpt.adamw(3e-2, betas, eps=eps, weight_decay=decay, decay=pattern)
    params, state = TREE, optimizer.init(TREE)
    for step in range(20):
        grads = gradients(step)
        for name, x in theirs.items():
            x.grad = grads[name].clone()
        reference.step()
        params, state = optimizer.update(grads, state, params)
        close(params, {name: x.detach() for name, x in theirs.items()}, 1e-6)
    assert state.count == 20
    assert (params["w"] - TREE["w"]).abs().max() > 0.1


def test_adamw_follows_a_schedule():
    schedule = cosine_schedule(1e-2, 10, warmup_steps=3)
    theirs = TREE["w"].clone().requires_grad_()
    reference = torch.optim.AdamW([theirs], lr=1.0, weight_decay=0.1)
    scheduler = LambdaLR(reference, lambda step: schedule(torch.tensor(step)).item())
    optimizer = fgpt.adamw(schedule, weight_decay=0.1)
    params, state = {"w": TREE["w"]}, optimizer.init({"w": TREE["w"]})
    for step in range(10):
        theirs.grad = gradients(step)["w"]
        reference.step()
        scheduler.step()
        params, state = optimizer.update({"w": gradients(step)["w"]}, state, params)
    close(params["w"], theirs.detach(), 1e-6)


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
    theirs = {name: torch.zeros_like(x).requires_grad_() for name, x in grads.items()}
    for name, x in theirs.items():
        x.grad = grads[name].clone()
    norm = torch.nn.utils.clip_grad_norm_(list(theirs.values()), most)
    close(global_norm(grads), norm, 1e-6, 1e-6)
    close(
        clip_by_global_norm(grads, global_norm(grads), most), {name: x.grad for name, x in theirs.items()}, 1e-6, 1e-6
    )
    assert (most < norm) == (not same(clip_by_global_norm(grads, global_norm(grads), most), grads))


# --------------------------------------------------------------------------------------------------------------- steps

GPT = tiny(n_layer=1)
ADAPTERS: Any = with_noise(fgpt.lora(GPT, fgpt.key(0), 2), seed=1)
WEIGHTS = (
    torch.rand(6, 7, generator=fgpt.key(0)) * (torch.arange(7) < torch.tensor([[1], [7], [3], [5], [2], [6]]))
).float()
BATCH = fgpt.Batch(tokens(31, 6, 7), tokens(31, 6, 7, seed=1), WEIGHTS)
OPTIMIZER = fgpt.adamw(1e-2, weight_decay=0.1)


def objective(adapters: Any, params: Any, batch: fgpt.Batch, rng: torch.Generator | None) -> tuple[Tensor, Tensor]:
    return fgpt.nll(fgpt.adapt(params, adapters), batch)


def part(rows: list[int], width: int) -> fgpt.Batch:
    """Some rows, cut to a width that still holds all of their weight."""
    return tree_map(lambda x: x[rows, :width], BATCH)


def splits() -> st.SearchStrategy[list[list[int]]]:
    def cut(order: list[int], cuts: set[int]) -> list[list[int]]:
        edges = [0, *sorted(cuts), 6]
        return [order[a:b] for a, b in itertools.pairwise(edges)]

    return st.builds(cut, st.permutations(range(6)), st.sets(st.integers(1, 5), max_size=5))


@given(splits(), st.sampled_from([None, 0.05]))
def test_ragged_micro_batches_are_one_batch(parts: list[list[int]], most: float | None):
    step, state = fgpt.make_step(objective, OPTIMIZER, max_norm=most), fgpt.init_state(ADAPTERS, OPTIMIZER)
    state, _ = step(state, GPT, [BATCH], None)  # moments that are not zero
    micro = [part(rows, max(int((WEIGHTS[i] > 0).sum()) for i in rows)) for rows in parts]
    one, together = step(state, GPT, [BATCH], None)
    many, apart = step(state, GPT, micro, None)
    close(many, one, 1e-6)
    close(apart, together, 1e-6, 1e-6)


def test_metrics_are_the_loss_the_norm_and_the_weight():
    _, metrics = fgpt.make_step(objective, OPTIMIZER)(fgpt.init_state(ADAPTERS, OPTIMIZER), GPT, [BATCH], None)
    expected = grad(lambda a: fgpt.loss(fgpt.adapt(GPT, a), BATCH))(ADAPTERS)
    close(metrics.loss, fgpt.loss(fgpt.adapt(GPT, ADAPTERS), BATCH), 1e-6)
    close(metrics.grad_norm, global_norm(expected), 1e-6)
    close(metrics.weight, WEIGHTS.sum(), 1e-6)


def test_a_step_is_pure():
    """The same inputs give bitwise the same result, and come out as they went in."""
    rng, world = fgpt.key(0), torch.get_rng_state()
    step, state = fgpt.make_step(objective, OPTIMIZER), fgpt.init_state(ADAPTERS, OPTIMIZER)
    state, _ = step(state, GPT, [BATCH], rng)
    inputs = (state, GPT, [BATCH])
    before = tree_map(torch.clone, inputs)
    first, second = step(*inputs, rng), step(*inputs, rng)
    assert same(first, second)
    assert same(before, inputs)
    assert torch.equal(torch.get_rng_state(), world)
    assert torch.equal(rng.get_state(), fgpt.key(0).get_state())
    assert first[0].step == state.step + 1
    assert not any(x.requires_grad for x in leaves(first).values())
    assert not same(first[0].trainable, state.trainable)


def test_training_lowers_the_loss():
    step, state = fgpt.make_step(objective, OPTIMIZER), fgpt.init_state(ADAPTERS, OPTIMIZER)
    losses = []
    for _ in range(15):
        state, metrics = step(state, GPT, [BATCH], None)
        losses.append(metrics.loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert isinstance(fgpt.adapt(GPT, state.trainable).blocks[0].attn.q.w, Adapted)


# -------------------------------------------------------------------------------------------------------------- import

PROBE = """
import json, logging, os, sys, time, warnings
import torch
def state():
    return {
        "dtype": str(torch.get_default_dtype()), "device": str(torch.get_default_device()),
        "grad": torch.is_grad_enabled(), "threads": torch.get_num_threads(), "seed": torch.initial_seed(),
        "rng": torch.get_rng_state().tolist(), "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "cudnn": [torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32],
        "print": str(torch._tensor_str.PRINT_OPTS), "env": dict(os.environ), "cwd": os.getcwd(), "path": sys.path,
        "warnings": [str(f) for f in warnings.filters], "handlers": [str(h) for h in logging.root.handlers],
        "level": logging.root.level, "hook": str(sys.excepthook),
    }
before = json.dumps(state())
start = time.process_time()
import fgpt
took = time.process_time() - start
after = json.dumps(state())
heavy = "torch._dynamo matplotlib datasets transformers pandas pyarrow bitsandbytes huggingface_hub tyro".split()
print(json.dumps([json.loads(before), json.loads(after), [m for m in heavy if m in sys.modules], took]))
"""


def test_importing_changes_nothing_and_is_quick():
    """Under a second beyond torch (of CPU, so that a busy machine tells the same; the best of three), nothing heavy."""
    took = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=True)
        before, after, heavy, seconds = json.loads(done.stdout)
        assert before == after
        assert heavy == []
        assert done.stderr == ""
        took.append(seconds)
    assert min(took) < 1.0


def test_the_b_of_an_adapter_is_not_the_bias_beside_it(gpt: fgpt.GPT):
    """Both could be called blocks.0.attn.q.b: counted, decayed and trained apart."""
    both = fgpt.lora(gpt, fgpt.key(0), 2, target=r"blocks\.0\.attn\.q") | fgpt.trainable_leaves(
        gpt, r"blocks\.0\.attn\.q\.b"
    )
    assert fgpt.num_trainable(both) == 2 * 16 * 2 + 16
    optimizer = fgpt.adamw(1e-2, weight_decay=0.5)
    step = fgpt.make_step(objective, optimizer)
    state = fgpt.init_state(both, optimizer)
    for _ in range(2):
        state, metrics = step(state, gpt, [BATCH], None)
    moved = {path: not torch.equal(x, leaves(both)[path]) for path, x in leaves(state.trainable).items()}
    assert moved == dict.fromkeys(["blocks.0.attn.q/a", "blocks.0.attn.q/b", "blocks.0.attn.q.b"], True)
    grads = torch.func.grad(lambda a: objective(a, gpt, BATCH, None)[0])(state.trainable)
    assert len(leaves(grads)) == 3
    assert float(metrics.grad_norm) > 0
    assert astype(both, torch.bfloat16)["blocks.0.attn.q"].b.dtype == torch.bfloat16  # pyright: ignore
