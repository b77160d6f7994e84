"""Model FLOPs utilisation: which part of the machine's matrix arithmetic a training uses.

    MFU = tokens per second · (6 N + 12 layers · heads · head size · seq) / peak

N counts the parameters that multiply a token: all but the position table and, where the head is another, the token
table. Each multiplies and adds once forward and twice backward. The other term is attention's, q with k and the weights
with v over whole rows of `seq`, as the source counts it, though the causal mask makes half of that needless. What is
computed again, or clipped, or averaged is no model's FLOP.

The peak is one that is given, or that of a large fp32 product on this machine, with the threads that torch has: of
several, the fastest, for others may be at work beside it.

Source: Chowdhery et al. 2022 (PaLM), appendix B.
"""

import time

import torch

from fgpt.model import GPT
from fgpt.tree import num_elements

SIDE = {"cpu": 1024, "cuda": 8192}
"""Of the square matrices that are multiplied: large enough for the full rate, on each kind of device."""
SECONDS = 0.5


def flops(params: GPT, seq: int) -> int:
    """Model FLOPs to train on one token, in rows of `seq`."""
    cfg = params.cfg
    tables = [params.wpe, None if cfg.tie_word_embeddings else params.wte]
    n = num_elements(params) - sum(num_elements(table) for table in tables if table is not None)
    return 6 * n + 12 * cfg.n_layer * cfg.n_head * cfg.head_size * seq


def peak(device: torch.device) -> float:
    """FLOPs per second of an fp32 matrix product, measured for half a second."""
    side = SIDE.get(device.type, SIDE["cpu"])
    a = torch.ones(side, side, device=device)
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        start = time.perf_counter()
        _ = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
