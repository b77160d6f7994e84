"""What the device can do: bandwidth of a copy, matmuls at GPT-2 medium's shapes, and the head's at two vocabularies."""

import torch
import torch.nn.functional as F

from experiments.bench.gpu.measure import DEVICE, median_seconds, milliseconds
from experiments.bench.gpu.report import Report


def ceilings(report: Report, tiny: bool) -> None:
    elements = 1 << 20 if tiny else 256 << 20
    x = torch.randn(elements, device=DEVICE)
    y = torch.empty_like(x)
    terabytes = 2 * 4 * elements / 1e12
    report.add("ceilings", "copy, read and written (TB/s)", round(terabytes / median_seconds(lambda: y.copy_(x)), 2))
    del x, y
    side, rows, d, d_mlp = (256, 128, 64, 256) if tiny else (8192, 8192, 1024, 4096)
    for dtype in (torch.bfloat16, torch.float32):
        what = f"matmul, {side} cubed, {str(dtype).removeprefix('torch.')} (TFLOP/s)"
        report.add("ceilings", what, matmul_rate(side, side, side, dtype))
    shapes = {"q": (d, d), "qkv": (3 * d, d), "up": (d_mlp, d), "down": (d, d_mlp)}
    for name, (out, inp) in shapes.items():
        report.add("ceilings", f"matmul of {name}, {rows} rows, bfloat16 (TFLOP/s)", matmul_rate(rows, out, inp))
    for m in (33,) if tiny else (333, 4096):
        for vocab in (50257, 50304):
            h, w, dy = (torch.randn(s, device=DEVICE, dtype=torch.bfloat16) for s in ((m, d), (vocab, d), (m, vocab)))
            times = milliseconds(lambda h=h, w=w: F.linear(h, w)), milliseconds(lambda dy=dy, w=w: dy @ w)
            report.add("ceilings", f"head, {m} rows, vocabulary {vocab}: forward, backward (ms)", times)


def matmul_rate(rows: int, out: int, inp: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """TFLOP/s of [rows, inp] @ [out, inp].T."""
    x, w = (torch.randn(size, device=DEVICE, dtype=dtype) for size in ((rows, inp), (out, inp)))
    return round(2 * rows * out * inp / median_seconds(lambda: F.linear(x, w)) / 1e12, 2)
