"""Versions, and which attention kernel torch chooses for which call."""

import torch

from experiments.bench.gpu.measure import DEVICE
from experiments.bench.gpu.report import Report

KERNELS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}


def environment(report: Report, tiny: bool) -> None:
    def add(what: str, value: object) -> None:
        report.add("environment", what, value)

    cuda = DEVICE.type == "cuda"
    add("torch", torch.__version__)
    add("device", torch.cuda.get_device_name() if cuda else "CPU")
    add("CUDA, cuDNN", (torch.version.cuda, torch.backends.cudnn.version()) if cuda else None)
    add("precision of fp32 matmuls", torch.get_float32_matmul_precision())
    add("partial sums in bf16", torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction)
    if not cuda:
        return
    for dtype in (torch.bfloat16, torch.float32):
        q = torch.randn(8, 16, 1024, 64, device=DEVICE, dtype=dtype)
        mask = torch.ones(8, 1, 1024, 1024, dtype=torch.bool, device=DEVICE).tril()
        last = q[:, :, -1:]
        choose = torch.ops.aten._fused_sdp_choice
        choices = {
            "causal": choose(q, q, q, None, 0.0, True),
            "packed, a mask": choose(q, q, q, mask, 0.0, False),
            "one query": choose(last, q, q, None, 0.0, False),
        }
        for what, choice in choices.items():
            add(f"attention, {str(dtype).removeprefix('torch.')}, {what}", KERNELS.get(int(choice), int(choice)))
