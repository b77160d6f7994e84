"""Greedy decoding: tokens per second, eager and with a compiled step."""

import time

import torch

import fgpt
from experiments.bench.gpu.measure import DEVICE, gpt2_medium, median_seconds, on
from experiments.bench.gpu.report import Report
from fgpt.tree import astype


def decoding(report: Report, tiny: bool) -> None:
    _, base = gpt2_medium(tiny)
    new_tokens, prompt = (4 if tiny else 64), list(range(1, 32))

    def generate(params: fgpt.GPT, rows: int, compile: bool = False) -> None:
        prompts = [[*prompt, row] for row in range(rows)]
        fgpt.generate(params, prompts, eos_token_id=-1, max_new_tokens=new_tokens, compile=compile)

    for dtype in (torch.float32, torch.bfloat16):
        params = on(astype(base, dtype))
        for rows in (1, 8):
            seconds = median_seconds(lambda p=params, n=rows: generate(p, n), 2, 1)
            report.add("decoding", f"{dtype}, eager, {rows} rows (tokens/s)", round(rows * new_tokens / seconds))
        if DEVICE.type != "cuda" or report.seconds_left < 90:
            continue
        start = time.perf_counter()
        generate(params, 1, compile=True)
        report.add("decoding", f"{dtype}, compiled, first call (s)", round(time.perf_counter() - start, 1))
        seconds = median_seconds(lambda p=params: generate(p, 1, compile=True), 2, 1)
        report.add("decoding", f"{dtype}, compiled, 1 row (tokens/s)", round(new_tokens / seconds))
