"""Generation with a GPT-2 of random weights, beside transformers' `generate`: greedy, batch sizes 1 and 8.

A decode step reads every weight once, so its limit is the bytes over the bandwidth of memory, which is measured too, by
summing a tensor of the same size.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.bench.baselines import base_of, equal_rows, hub_model, shape
from experiments.bench.timing import Result, hardware, in_fresh_processes, report, speeds, time_interleaved
from fgpt.generation.loop import generate
from fgpt.model import GPT, Config
from fgpt.quantization import quantize
from fgpt.tree import nbytes

CPU = torch.device("cpu")
PROMPT = 32
"""Tokens of the prompt."""
SIDES = ("fp32", "int8", "fp32, compiled", "int8, compiled")
TARGETS = {
    ("fp32", 1): ">= 1.1",
    ("fp32, compiled", 1): ">= 1.6",
    ("int8, compiled", 1): ">= 2.5",
    ("fp32, compiled", 8): ">= 1.5",
}
"""By side and batch size."""


@dataclass(frozen=True)
class Decode:
    """Tokens per second of greedy decoding, beside transformers."""

    processes: int = 3
    """Fresh processes, one after the other: medians and ranges over them are reported."""
    repeats: int = 3
    """Rounds in each process."""
    max_new_tokens: int = 128
    """New tokens."""
    layers: int = 12
    """12 is GPT-2 small; fewer for a quick look."""
    vocab: int = 50257
    out: Path = Path("runs/bench")


def decode(bench: Decode) -> None:
    """Run both sides and write runs/bench/decode.json and decode.md. Raises InputError."""
    cfg = config_of(bench)
    notes = [f"{hardware(CPU)}; {shape(cfg)}; prompts of {PROMPT} tokens, {bench.max_new_tokens} new ones"]
    notes.append(f"medians and ranges of {bench.processes} processes, each of {bench.repeats} alternating rounds")
    results = in_fresh_processes(bench.processes, measure, bench)
    speed = {name: result.value for name, result in zip(SIDES, results, strict=False)}  # of one row
    base = base_of(cfg, CPU, torch.float32)
    for name, params in (("fp32", base), ("int8", to_int8(base))):
        rate = bandwidth(nbytes(params))
        limit = rate / nbytes(params)
        size = f"{name}: {nbytes(params) / 1e6:,.0f} MB at {rate / 1e9:.1f} GB/s allow {limit:.1f} tokens/s"
        parts = f"eager {speed[name] / limit:.2f} of it, compiled {speed[f'{name}, compiled'] / limit:.2f}"
        notes.append(f"{size}; {parts}")
    report("decode", ("ours", "theirs"), results, notes, bench.out)


def config_of(bench: Decode) -> Config:
    return Config(bench.layers, 12, 768, 1024, bench.vocab, 3072)


def to_int8(base: GPT) -> GPT:
    return quantize(base, "int8", target=r"wte|blocks\..*")


def measure(bench: Decode) -> list[Result]:
    """Every side against transformers, with one row and with eight."""
    cfg = config_of(bench)
    base = base_of(cfg, CPU, torch.float32)
    model = hub_model(cfg, base).eval()
    model.generation_config.eos_token_id = None  # a text of random weights must not end
    trees = {"fp32": base, "int8": to_int8(base)}
    results: list[Result] = []
    for rows in (1, 8):
        prompts = [list(row.tokens[:PROMPT]) for row in equal_rows(rows, PROMPT + 1, cfg.vocab_size)]
        calls: dict[str, Callable[[], object]] = {
            name: partial(
                generate,
                trees[name.partition(",")[0]],
                prompts,
                eos_token_id=-1,
                max_new_tokens=bench.max_new_tokens,
                compile="compiled" in name,
            )
            for name in SIDES
        }
        calls["theirs"] = partial(transformers_generate, model, torch.tensor(prompts), bench.max_new_tokens)
        seconds = time_interleaved({name: [call] * bench.repeats for name, call in calls.items()}, CPU)
        for name in SIDES:
            what = f"{name}, batch {rows}, against transformers in fp32"
            target = TARGETS.get((name, rows), "")
            results.append(speeds(what, rows * bench.max_new_tokens, seconds[name], seconds["theirs"], target))
    return results


def transformers_generate(model: Any, prompts: torch.Tensor, max_new_tokens: int) -> None:
    model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=max_new_tokens, do_sample=False, use_cache=True
    )


def bandwidth(size: int) -> float:
    """Bytes per second of reading a tensor of `size` bytes, the best of seven times."""
    x = torch.ones(size // 4)
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        x.sum()
        best = min(best, time.perf_counter() - start)
    return size / best
