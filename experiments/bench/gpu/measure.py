"""Times on a device, differences between devices, and batches of random tokens."""

import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fgpt.losses import Batch
from fgpt.model import GPT, Config, init
from fgpt.rng import key
from fgpt.tree import leaves, tree_map

T = TypeVar("T")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")

LORA_TARGET = r"blocks\..*\.(q|k|v|o)"
FUSED_TARGET = r"blocks\..*\.(qkv|o)"


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def median_seconds(call: Callable[[], object], repeats: int = 7, warmup: int = 2) -> float:
    """Of one call, the device's work included."""
    for _ in range(warmup):
        call()
    seconds: list[float] = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def milliseconds(call: Callable[[], object], repeats: int = 7, warmup: int = 2) -> float:
    return round(1e3 * median_seconds(call, repeats, warmup), 3)


def relative_error(tree: Any, reference: Any) -> float:
    """‖tree - reference‖ / ‖reference‖, over all leaves, in doubles."""
    x, y = (
        torch.cat([leaf.detach().double().cpu().flatten() for leaf in leaves({"": t}).values()])
        for t in (tree, reference)
    )
    return float((x - y).norm() / y.norm())


def on(tree: T, device: torch.device = DEVICE) -> T:
    """`tree` on a device."""
    return tree_map(lambda x: x.to(device), tree)


def gpt2_medium(tiny: bool) -> tuple[Config, GPT]:
    """GPT-2 medium's shape with random weights; `tiny` is a shape for a CPU, to try the sections themselves."""
    if tiny:
        cfg = Config(n_layer=3, n_head=4, d_model=64, n_ctx=128, vocab_size=512, d_mlp=256)
    else:
        cfg = Config(n_layer=24, n_head=16, d_model=1024, n_ctx=1024, vocab_size=50257, d_mlp=4096)
    return cfg, init(cfg, key(0))


def packed_batch(rows: int, seq: int, vocab_size: int, documents: int = 8) -> Batch:
    """Rows of equal documents of random tokens; the second half of each document has weight 1."""
    rng = torch.Generator().manual_seed(rows * seq)
    tokens = torch.randint(vocab_size, (rows, seq), generator=rng)
    targets = torch.randint(vocab_size, (rows, seq), generator=rng)
    place = torch.arange(seq) * documents
    weights = (place % seq >= seq / 2).float().expand(rows, seq).contiguous()
    segments = (place // seq + 1).expand(rows, seq).contiguous() if documents > 1 else None
    bounds = torch.arange(documents + 1, dtype=torch.int32) * seq // documents
    cu_seqlens = bounds.expand(rows, documents + 1).contiguous() if documents > 1 else None
    return Batch(tokens, targets, weights, segments, weights.flatten().nonzero().flatten(), cu_seqlens)
