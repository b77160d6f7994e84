"""A step of N LoRAs as one stack against one LoRA's, and that each member's loss is that of its own step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fgpt
from experiments.bench.gpu.measure import DEVICE, median_seconds, on
from experiments.bench.gpu.report import Report
from fgpt.losses import Batch
from fgpt.model import Config, init
from fgpt.rng import key
from fgpt.sweeps import stack_batches, stack_states, sweep_step
from fgpt.tree import astype

ROWS, TOKENS = 4, 128


def stacked_members(report: Report, tiny: bool) -> None:
    layers, width, vocab = (2, 64, 512) if tiny else (12, 768, 50257)
    cfg = Config(layers, width // 64 if width > 64 else 2, width, 1024, vocab, 4 * width)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    base = on(astype(init(cfg, key(0)), dtype))
    for count in (2, 3) if tiny else (8, 32):
        stacked, alone = sides(base, count)
        seconds, one = median_seconds(stacked, 5), median_seconds(alone, 5)
        what = f"{count} members of {ROWS} x {TOKENS} tokens"
        report.add("sweep", f"{what}: one step (ms)", round(1e3 * seconds, 2))
        report.add(
            "sweep",
            f"{what}: {count} steps of one / one step (target {4 if count == 8 else 8})",
            round(count * one / seconds, 2),
        )
        losses, first = stacked()[1].loss, alone()[1].loss
        report.add("sweep", f"{what}: relative difference of a loss", f"{abs(float(losses[0] / first) - 1):.1e}")
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            stacked()
            report.add("sweep", f"{what}: peak (GB)", round(torch.cuda.max_memory_allocated() / 1e9, 2))


def sides(base: fgpt.GPT, count: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The step of all members, and that of the first one."""
    optimizer, generator = fgpt.adamw(0.0), torch.Generator().manual_seed(0)
    text = torch.randint(0, base.cfg.vocab_size, (count, ROWS, TOKENS + 1), generator=generator)
    batches = [on(Batch(x[:, :-1], x[:, 1:], torch.ones(ROWS, TOKENS))) for x in text]
    lrs = torch.logspace(-4, -2, count, device=DEVICE)
    states = [fgpt.init_state(fgpt.lora(base, key(i), rank=8), optimizer) for i in range(count)]

    def loss(adapters: Any, params: fgpt.GPT, batch: Batch, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        return fgpt.nll(fgpt.adapt(params, adapters, rng=seed), batch)

    step, one = sweep_step(lambda h: fgpt.make_step(loss, fgpt.adamw(h["lr"]))), fgpt.make_step(loss, fgpt.adamw(1e-4))
    stack, together = stack_states(states, optimizer), stack_batches([[batch] for batch in batches])
    return lambda: step(stack, base, together, None, {"lr": lrs}), lambda: one(states[0], base, [batches[0]], None)
