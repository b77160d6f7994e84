"""How texts are drawn, and sets of adapters for a batch of prompts."""

from dataclasses import replace

import torch

import fgpt
from fgpt.generation.sampling import SamplingParams

WARM_SAMPLING = SamplingParams(temperature=1.2, top_k=20, top_p=0.95)


def adapter_sets(params: fgpt.GPT) -> list[fgpt.Adapters]:
    """Of several ranks, strengths and targets; the last one is none."""
    drawn = [
        fgpt.lora(params, fgpt.key(0), 2, target=r"blocks\..*\.(q|up)"),
        fgpt.lora(params, fgpt.key(1), 3, 1.0, target=r"blocks\..*\.(q|down)|wte", rs=True),
    ]
    moved = [{p: replace(x, b=0.5 * torch.randn_like(x.b)) for p, x in adapters.items()} for adapters in drawn]
    return [*moved, {}]
