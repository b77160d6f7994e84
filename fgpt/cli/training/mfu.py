"""Model FLOPs utilization: the share of the machine's peak matrix arithmetic that a training uses.

    MFU = tokens per second · (6 N + 12 layers · heads · head size · seq) / peak

N counts the parameters that multiply a token: all except the position table and, if embeddings are not tied, the token
table. Each multiplies and adds once forward and twice backward. The other term is attention's, q with k and the weights
with v over full rows of `seq`, as the source counts it, though the causal mask makes half of that unnecessary.
Recomputation, clipping and averaging do not count.

The peak is either given or measured: the fastest of several large products in the training's dtype on this machine,
with torch's threads, since other processes may run beside them.

Source: Chowdhery et al. 2022 (PaLM), appendix B.
"""

import time

import torch

from fgpt.model import GPT
from fgpt.tree import num_elements

MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the multiplied matrices: large enough for the full rate, by kind of device."""
SECONDS = 0.5
"""How long the peak is measured."""


def flops(params: GPT, seq: int) -> int:
    """Model FLOPs to train on one token, in rows of `seq` tokens."""
    cfg = params.cfg
    tables = [params.wpe, None if cfg.tie_word_embeddings else params.wte]
    n = num_elements(params) - sum(num_elements(table) for table in tables if table is not None)
    return 6 * n + 12 * cfg.n_layer * cfg.n_head * cfg.head_size * seq


def peak(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """FLOPs per second of a matrix product in `dtype`, measured for half a second."""
    size = MATRIX_SIZE.get(device.type, MATRIX_SIZE["cpu"])
    a = torch.randn(size, size, device=device, dtype=dtype)  # of ones, a GPU draws less power and is faster
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        _ = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
