"""Quantization on the device, and a LoRA gradient over each format beside bf16."""

import time

import torch

import fgpt
from experiments.bench.gpu.lora_steps import loss
from experiments.bench.gpu.measure import LORA_TARGET, gpt2_medium, milliseconds, on, packed_batch, synchronize
from experiments.bench.gpu.report import Report
from fgpt.quantization import Format
from fgpt.train_step import value_and_grad_once
from fgpt.tree import astype

FORMATS: tuple[Format, ...] = ("nf4", "int8", "blockwise8")


def quantized_bases(report: Report, tiny: bool) -> None:
    cfg, base = gpt2_medium(tiny)
    short, batch = on(astype(base, torch.bfloat16)), on(packed_batch(4, cfg.n_ctx, cfg.vocab_size))
    bases = {"bf16": short}
    for format in FORMATS:
        start = time.perf_counter()
        bases[format] = fgpt.quantize(short, format)
        synchronize()
        report.add("quantized bases", f"{format}: quantization (s)", round(time.perf_counter() - start, 2))
    for name, params in bases.items():
        adapters = fgpt.lora(params, fgpt.key(1), 8, 16, LORA_TARGET)
        time_of = milliseconds(lambda a=adapters, p=params: value_and_grad_once(loss, a, p, batch, None), 5, 1)
        report.add("quantized bases", f"{name}: gradient of 4 rows (ms)", time_of)
