"""A step of N LoRAs as one stack against N steps of one, and that each member's loss is that of its own step."""

import torch

from experiments.bench.gpu.measure import DEVICE, median_seconds, on
from experiments.bench.gpu.report import Report
from experiments.bench.member_steps import steps_of_members
from fgpt.model import Config, init
from fgpt.rng import key
from fgpt.tree import astype

ROWS, TOKENS = 4, 128


def stacked_members(report: Report, tiny: bool) -> None:
    layers, width, vocab = (2, 64, 512) if tiny else (12, 768, 50257)
    cfg = Config(layers, width // 64 if width > 64 else 2, width, 1024, vocab, 4 * width)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    base = on(astype(init(cfg, key(0)), dtype))
    for count in (2, 3) if tiny else (8, 32):
        stacked, alone = steps_of_members(base, count, ROWS, TOKENS)
        seconds, others = median_seconds(stacked, 5), median_seconds(alone, 5)
        what = f"{count} members of {ROWS} x {TOKENS} tokens"
        report.add("sweep", f"{what}: one step (ms)", round(1e3 * seconds, 2))
        report.add(
            "sweep",
            f"{what}: {count} steps of one / one step (target {4 if count == 8 else 8})",
            round(others / seconds, 2),
        )
        losses, first = stacked()[1].loss, alone()[0][1].loss
        report.add("sweep", f"{what}: relative difference of a loss", f"{abs(float(losses[0] / first) - 1):.1e}")
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            stacked()
            report.add("sweep", f"{what}: peak (GB)", round(torch.cuda.max_memory_allocated() / 1e9, 2))
