"""Greedy decoding: tokens per second and the share of memory bandwidth, by step and by format of the base; beside
transformers, with its static cache and compiled, if it is installed.

A decode step reads every weight once, so that bytes of weights times steps per second is a bandwidth, and its share of
what a copy reaches is how near the limit a step is. The embedding table is read by the head; positions are not counted.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fgpt
from experiments.bench.gpu.measure import CPU, DEVICE, gpt2_medium, median_seconds, on
from experiments.bench.gpu.report import Report
from fgpt.generation import static_cache
from fgpt.generation.cuda_graph import GraphedStep
from fgpt.tree import astype, nbytes

SECTION = "decoding"
PROMPT = 32
SECONDS_OF_COMPILING = 60
"""Of the time limit: with less left, nothing more is compiled."""

Step = Callable[..., Tensor]


def decoding(report: Report, tiny: bool) -> None:
    cfg, base = gpt2_medium(tiny)
    bandwidth = copy_bandwidth(tiny)
    report.add(SECTION, "copy (GB/s, read and written)", round(bandwidth / 1e9, 1))
    short = astype(base, torch.bfloat16)
    bases = {"bf16": on(short), "fp32": on(base)}
    for format in ("int8", "nf4"):
        bases[format] = fgpt.quantize(on(short), format, target=r"blocks\..*")
    for name, params in bases.items():
        for rows in (1, 8):
            compiled = name == "bf16" and report.seconds_left > SECONDS_OF_COMPILING
            for how, step in steps(compiled).items():
                seconds = seconds_a_step(params, step, rows, 4 if tiny else 64)
                share = round(nbytes(params) / seconds / bandwidth, 3)
                rate = round(rows / seconds)
                report.add(SECTION, f"{name}, {rows} rows, {how} (tokens/s; share of bandwidth)", f"{rate}; {share}")
    texts(report, bases["bf16"], 4 if tiny else 64)
    if importlib.util.find_spec("transformers") is None:
        report.add(SECTION, "transformers", "not installed")
        return
    transformers_decoding(report, cfg, base, 4 if tiny else 64, compiled=DEVICE.type == "cuda")


def steps(compile: bool) -> dict[str, Step]:
    """The eager step; on CUDA its graph, and if asked the compiled step and the graph of that."""
    eager = static_cache.decode_step
    if DEVICE.type != "cuda":
        return {"eager": eager}
    chosen: dict[str, Step] = {"eager": eager, "graph": GraphedStep(eager)}
    if compile:
        compiled = static_cache.compiled_decode_step()
        chosen |= {"compiled": compiled, "graph of the compiled": GraphedStep(compiled)}
    return chosen


@torch.no_grad()
def seconds_a_step(params: fgpt.GPT, step: Step, rows: int, count: int) -> float:
    """Of one decode step after a prompt, tokens chosen on the device: nothing waits for the host."""
    prompts = torch.arange(PROMPT, device=DEVICE).repeat(rows, 1)
    logits, cache = static_cache.prefill(params, prompts, None, 3 * count + 4)
    for _ in range(3):  # compiles, warms up, records
        logits = step(params, logits.argmax(-1), cache)

    def run() -> None:
        chosen = logits
        for _ in range(count):
            chosen = step(params, chosen.argmax(-1), cache)

    return median_seconds(run, 2, 1) / count


def texts(report: Report, params: fgpt.GPT, new_tokens: int) -> None:
    """Whole texts, sampling and the host's part included."""
    for rows in (1, 8):
        prompts = [[*range(PROMPT - 1), row] for row in range(rows)]
        call = lambda p=prompts: fgpt.generate(params, p, eos_token_id=-1, max_new_tokens=new_tokens)  # noqa: E731
        rate = round(rows * new_tokens / median_seconds(call, 2, 1))
        report.add(SECTION, f"bf16, {rows} rows, whole texts by generate (tokens/s)", rate)


def transformers_decoding(report: Report, cfg: fgpt.Config, base: fgpt.GPT, new_tokens: int, compiled: bool) -> None:
    """The same texts by transformers in bf16: its default cache, and its static cache, compiled."""
    from experiments.bench.baselines import hub_model

    model: Any = hub_model(cfg, on(base, CPU)).eval().to(DEVICE, torch.bfloat16)
    model.generation_config.eos_token_id = None
    sides: dict[str, dict[str, Any]] = {"default cache": {}}
    if compiled and report.seconds_left > SECONDS_OF_COMPILING:
        sides["static cache, compiled"] = {"cache_implementation": "static"}  # generate then compiles its forward
    for rows in (1, 8):
        prompts = torch.tensor([[*range(PROMPT - 1), row] for row in range(rows)], device=DEVICE)
        options = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": new_tokens}
        options |= {"do_sample": False, "use_cache": True}
        for how, more in sides.items():
            seconds = median_seconds(lambda p=prompts, o=options | more: model.generate(p, **o), 2, 2)
            rate = round(rows * new_tokens / seconds)
            report.add(SECTION, f"transformers in bf16, {rows} rows, {how} (tokens/s)", rate)


def copy_bandwidth(tiny: bool) -> float:
    """Bytes per second of a copy, read and written."""
    x = torch.empty((1 << 20) if tiny else (1 << 29), dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.numel() / median_seconds(lambda: y.copy_(x), 5, 2)
