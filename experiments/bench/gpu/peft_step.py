"""The same LoRA step in transformers and PEFT."""

from collections.abc import Callable
from functools import partial

import torch

from experiments.bench.baselines import adapters_of, equal_rows, fgpt_batch, fgpt_step, hub_model, peft_batch, peft_step
from experiments.bench.gpu.measure import DEVICE, gpt2_medium, median_seconds, on
from experiments.bench.gpu.report import Report
from fgpt.model import fuse_qkv
from fgpt.tree import astype

ROWS = 8


def compare_with_peft(report: Report, tiny: bool) -> None:
    cfg, params = gpt2_medium(tiny)
    base = on(astype(fuse_qkv(params), torch.bfloat16))
    examples = equal_rows(ROWS, cfg.n_ctx, cfg.vocab_size)
    with_peft = peft_step(hub_model(cfg, base), DEVICE, torch.bfloat16, adapters_of(base))
    sides: dict[str, Callable[[], float]] = {
        "fgpt": partial(fgpt_step(base), fgpt_batch([[x] for x in examples], DEVICE)),
        "transformers and PEFT": partial(with_peft, peft_batch(examples, DEVICE)),
    }
    for name, step in sides.items():
        first_loss = step()
        seconds = median_seconds(step, 5, 1)
        values = {
            "ms": round(1e3 * seconds, 1),
            "tokens/s": round(ROWS * cfg.n_ctx / seconds),
            "first loss": first_loss,
        }
        report.add("PEFT", f"{name}, {ROWS} x {cfg.n_ctx} tokens, r8 on c_attn", values)
