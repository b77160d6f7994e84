"""The first call of attention at a new width against the next: cuDNN builds a plan for each shape. Packed documents by
their bounds against a mask, and per-example attention against one batch: values, gradients and time.
"""

import torch
from torch import Tensor
from torch.func import grad, vmap

from experiments.bench.gpu.measure import DEVICE, milliseconds, relative_error
from experiments.bench.gpu.report import Report
from fgpt.kernels.attention import attention, reference
from fgpt.kernels.documents import Documents


def attention_shapes(report: Report, tiny: bool) -> None:
    widths = (64, 63) if tiny else (1024, 1019, 1011, 1003)
    for width in widths:
        report.add("attention", f"masked, width {width}: three calls (ms)", three_calls(width, width, masked=True))
    for width in widths[:2]:
        report.add("attention", f"causal, width {width}: three calls (ms)", three_calls(width, width, masked=False))
    for width in (9,) if tiny else (100, 101, 102):
        report.add("attention", f"one query, {width} keys: three calls (ms)", three_calls(1, width, masked=False))
    if DEVICE.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
        for width in (1018, 1010):
            times = three_calls(width, width, masked=True)
            report.add("attention", f"masked, width {width}, without cuDNN: three calls (ms)", times)
        torch.backends.cuda.enable_cudnn_sdp(True)
    for kv_heads in (16, 4):
        documents_against_a_mask(report, tiny, kv_heads)
    for dtype in (torch.bfloat16, torch.float32):
        examples_against_a_batch(report, tiny, dtype)


def three_calls(queries: int, keys: int, *, masked: bool) -> list[float]:
    """Of attention and its backward, in bf16."""
    dtype = torch.bfloat16
    q = torch.randn(2, 16, queries, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    k = torch.randn(2, 16, keys, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    mask = torch.ones(2, 1, queries, keys, dtype=torch.bool, device=DEVICE).tril(keys - queries) if masked else None

    def both() -> None:
        torch.autograd.grad(attention(q, k, k, mask).sum(), (q, k))

    return [milliseconds(both, repeats=1, warmup=0) for _ in range(3)]


def operands(rows: int, seq: int, kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v, as a product of hidden states leaves them: the heads of a token side by side."""
    rng = torch.Generator(DEVICE).manual_seed(0)
    sizes = [(rows, seq, heads, 64) for heads in (16, kv_heads, kv_heads)]
    return [torch.randn(size, generator=rng, device=DEVICE, dtype=dtype).transpose(1, 2) for size in sizes]


def documents_against_a_mask(report: Report, tiny: bool, kv_heads: int) -> None:
    """Rows of documents of some 130 tokens with empty ones at the end, in bf16; both are compared with fp32."""
    rows, seq, dtype = 2 if tiny else 8, 64 if tiny else 1024, torch.bfloat16
    lengths = torch.randint(seq // 16, seq // 5, (rows, 24), generator=torch.Generator().manual_seed(0))
    bounds = torch.cat([torch.zeros(rows, 1), lengths.cumsum(1).clamp(max=seq)], 1)
    documents = Documents(bounds.to(DEVICE, torch.int32))
    assert int(documents.cu_seqlens[:, -1].min()) == seq
    q, k, v = (x.requires_grad_() for x in operands(rows, seq, kv_heads, dtype))
    mask, weight = documents.mask(seq), torch.randn_like(q)

    def run(by: Documents | Tensor) -> tuple[Tensor, ...]:
        y = attention(q, k, v, by)
        return y, *torch.autograd.grad((y * weight).sum(), (q, k, v))

    wide_q, wide_k, wide_v = (x.detach().float().requires_grad_() for x in (q, k, v))
    y = reference(wide_q, wide_k, wide_v, mask)
    expected = (y, *torch.autograd.grad((y * weight).sum(), (wide_q, wide_k, wide_v)))
    for name, by in {"documents": documents, "mask": mask}.items():
        what = f"{rows} x {seq} packed, {kv_heads} heads of keys, by {name}"
        errors = [f"{relative_error(x, of):.1e}" for x, of in zip(run(by), expected, strict=True)]
        report.add("attention", f"{what}: relative error of y, dq, dk, dv", errors)
        report.add("attention", f"{what}: forward and backward (ms)", milliseconds(lambda by=by: run(by)))


def examples_against_a_batch(report: Report, tiny: bool, dtype: torch.dtype) -> None:
    """Gradients of 32 examples in one call under vmap against those of a batch of 32."""
    examples, seq = 4 if tiny else 32, 16 if tiny else 256
    x = operands(examples, seq, 16, dtype)

    def total(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v).float().square().sum()

    calls = {"one by one, vmap(grad)": vmap(grad(total, (0, 1, 2))), "in one batch": grad(total, (0, 1, 2))}
    for name, call in calls.items():
        time = milliseconds(lambda call=call: call(*x))
        report.add("attention", f"{examples} x {seq} in {dtype}, {name} (ms)", time)
    error = relative_error(*(list(call(*x)) for call in calls.values()))
    report.add(
        "attention", f"{examples} x {seq} in {dtype}, one by one against a batch: relative error", f"{error:.1e}"
    )
