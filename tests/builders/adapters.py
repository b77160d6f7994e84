"""A GPT-2 over every kind of base, adapters of every kind, weights of every kind."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import fgpt
from builders import close, tiny, tokens
from fgpt.kernels.quantized_linear import QUANTIZED, Format, Rotated, quantize_matrix, reference
from fgpt.tree import astype

LINEARS = r"blocks\.\d+\.(attn|mlp)\.\w+"
X, Y = tokens(31, 2, 9), tokens(31, 2, 9, seed=1)
BATCH = fgpt.Batch(X, Y, torch.ones(2, 9))
PLAIN = tiny(d_model=64, d_mlp=128)  # rows of whole blocks, as every format wants them
BASES: dict[str, fgpt.GPT] = {
    "fp32": PLAIN,
    "bf16": astype(PLAIN, torch.bfloat16),
    "nf4": fgpt.quantize(PLAIN, "nf4"),
    "int8": fgpt.quantize(PLAIN, "int8"),
    "blockwise8": fgpt.quantize(PLAIN, "blockwise8"),
    "nf4 of bf16": fgpt.quantize(astype(PLAIN, torch.bfloat16), "nf4"),
}
FRESH: dict[str, Callable[[fgpt.GPT], fgpt.Adapters]] = {
    "lora": lambda p: fgpt.lora(p, fgpt.key(0), 4, target=LINEARS),
    "rs": lambda p: fgpt.lora(p, fgpt.key(0), 4, target=LINEARS, rs=True),
    "dora": lambda p: fgpt.dora(p, fgpt.key(0), 4, target=LINEARS),
    "ia3": lambda p: fgpt.ia3(p, rows=LINEARS, cols=LINEARS),
    "lora and dropout": lambda p: fgpt.lora(p, fgpt.key(0), 4, target=LINEARS, dropout=0.5),
}


def loss_of(params: fgpt.GPT) -> Callable[[fgpt.Adapters], Tensor]:
    return lambda adapters: fgpt.loss(fgpt.adapt(params, adapters), BATCH)


def step_loss(adapters: Any, params: Any, batch: fgpt.Batch, rng: Tensor | None) -> tuple[Tensor, Tensor]:
    return fgpt.nll(fgpt.adapt(params, adapters, rng=rng), batch)


def three_steps(params: Any, adapters: Any, batch: fgpt.Batch) -> tuple[Any, list[float]]:
    """What is trained after three steps of AdamW, and the loss before each."""
    optimizer = fgpt.adamw(1e-2)
    step = fgpt.make_step(step_loss, optimizer)
    state, losses = fgpt.init_state(adapters, optimizer), []
    for _ in range(3):
        state, metrics = step(state, params, [batch], None)
        losses.append(float(metrics.loss))
    return state.trainable, losses


def assert_near(got: Tensor, expected: Tensor, rel: float = 1e-5) -> None:
    """Close, as a part of the largest number: what fp32 can promise of a sum that cancels."""
    close(got.double(), expected.double(), rel * expected.abs().max().item())


OUT, IN = 7, 64


def random_matrix(kind: str, *size: int, seed: int = 0) -> Any:
    if kind.startswith("rotated "):
        return Rotated(random_matrix(kind.removeprefix("rotated "), *size, seed=seed), block=16)
    w = torch.randn(*size, generator=fgpt.key(seed)) / 8
    formats: dict[str, Format] = {"nf4": "nf4", "fp4": "fp4", "int8": "int8", "blockwise8": "blockwise8"}
    return (
        quantize_matrix(w, formats[kind])
        if kind in formats
        else w.to({"fp32": torch.float32, "bf16": torch.bfloat16}[kind])
    )


@st.composite
def random_weights(draw: st.DrawFn, *kinds: str, columns: bool = True) -> Any:
    """A weight of one to three layers of the normal form, each with any of its three parts, over a frozen matrix."""
    seed = draw(st.integers(0, 999))
    w: Any = random_matrix(draw(st.sampled_from(kinds)), OUT, IN, seed=seed)
    rng = torch.Generator().manual_seed(seed + 1)
    for _ in range(draw(st.integers(1, 3))):
        rank, scale = draw(st.integers(0, 4)), draw(st.sampled_from([0.5, 8.0]))
        a, b = (torch.randn(*size, generator=rng) for size in ((rank, IN), (OUT, rank)))
        row, col = (1 + torch.randn(n, generator=rng) for n in (OUT, IN))  # of either sign
        keep = draw(st.booleans()), columns and draw(st.booleans())
        parts = (a, b) if rank else (None, None)
        mid = torch.randn(rank, rank, generator=rng) if rank and draw(st.booleans()) else None
        w = fgpt.Adapted(w, *parts, row if keep[0] else None, col if keep[1] else None, mid=mid, scale=scale)
    return w


def dense_by_definition(w: Any) -> Tensor:
    """What `w` is defined to be, in float64."""
    if not isinstance(w, fgpt.Adapted):
        return (reference(w) if isinstance(w, QUANTIZED) else w).double()
    v = dense_by_definition(w.base)
    if w.a is not None and w.b is not None:
        mid = torch.eye(len(w.a)) if w.mid is None else w.mid
        v = v + w.scale * torch.einsum("or,rs,si->oi", w.b.double(), mid.double(), w.a.double())
    rows = torch.ones(OUT) if w.row is None else w.row
    return torch.diag(rows.double()) @ v @ torch.diag((torch.ones(IN) if w.col is None else w.col).double())
