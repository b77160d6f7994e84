"""Model FLOPs utilization: the share of the machine's peak matrix arithmetic that a training uses.

    MFU = tokens per second · (6 N + 12 layers · heads · head size · seq) / peak

N counts the parameters that multiply a token: all except the position table and, if embeddings are not tied, the token
table. Each multiplies and adds once forward and twice backward. The other term is attention's, q with k and the weights
with v over full rows of `seq`, as the source counts it, though the causal mask makes half of that unnecessary.
Recomputation, clipping and averaging do not count.

A tuning counts less, `tuning_flops`: a frozen parameter has no gradient of its own, so that 6 N would flatter it by
half. Both count padding as tokens, 3 to 4 % of a packed row.

The peak is either given or measured: the fastest of several large products in the training's dtype on this machine,
with torch's threads, since other processes may run beside them.

Source: Chowdhery et al. 2022 (PaLM), appendix B.
"""

import time

import torch

from fgpt.adapter_types import Adapters
from fgpt.adapters import LEAVES
from fgpt.layers import num_parameters
from fgpt.model import GPT, lm_head
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


def tuning_flops(base: GPT, trained: Adapters, loss_share: float) -> float:
    """Model FLOPs to tune on one token: 4 for each frozen parameter that multiplies it, 6 for each trained one. The
    head multiplies only the tokens that carry loss.

    Attention's own products do not count: in packed rows they depend on the lengths of the documents, a few percent of
    the rest if those are short.

    Args:
        base: The frozen model.
        trained: Its adapters.
        loss_share: The share of the tokens that carry loss.
    """
    head = num_parameters(lm_head(base).w)
    tables = num_parameters(base.wte) + (0 if base.wpe is None else num_parameters(base.wpe))
    frozen = num_parameters(base) - tables - (0 if base.head is None else num_parameters(base.head.w))
    total = 4 * (frozen + loss_share * head)
    for path, adapter in trained.items():
        is_head = path in ("head.w", "wte.w" if base.head is None else "head.w")
        if isinstance(adapter, LEAVES):  # it stands for a parameter of the base, which is counted already
            is_table = path.startswith(("wte.", "wpe.")) and not is_head
            total += 0 if is_table else 2 * num_parameters(adapter) * (loss_share if is_head else 1)
        else:
            total += 6 * num_elements(adapter)
    return total


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
