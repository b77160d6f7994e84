"""The first call of attention at a new width against the next: cuDNN builds a plan for each shape."""

import torch

from experiments.bench.gpu.measure import DEVICE, milliseconds
from experiments.bench.gpu.report import Report
from fgpt.kernels.attention import attention


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


def three_calls(queries: int, keys: int, *, masked: bool) -> list[float]:
    """Of attention and its backward, in bf16."""
    dtype = torch.bfloat16
    q = torch.randn(2, 16, queries, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    k = torch.randn(2, 16, keys, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    mask = torch.ones(2, 1, queries, keys, dtype=torch.bool, device=DEVICE).tril(keys - queries) if masked else None

    def both() -> None:
        torch.autograd.grad(attention(q, k, k, mask).sum(), (q, k))

    return [milliseconds(both, repeats=1, warmup=0) for _ in range(3)]
