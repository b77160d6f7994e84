"""Initializations of LoRA by name, and the bases that they begin from."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

import fgpt
from builders import tiny, tokens
from builders.hf_models import hf_model, save_and_load
from fgpt.tree import get_at

TOKENS = tokens(31, 3, 9)
BATCH = fgpt.Batch(TOKENS, tokens(31, 3, 9, seed=1), torch.ones(3, 9))


def batch_loss(params: fgpt.GPT) -> torch.Tensor:
    return fgpt.loss(params, BATCH)


CHANGE_THE_BASE: dict[str, Callable[..., tuple[fgpt.GPT, Any]]] = {
    "pissa": fgpt.pissa,
    "pissa, fast": lambda params, **options: fgpt.pissa(params, svd_iterations=1, **options),
    "olora": fgpt.olora,
    "lora_ga": lambda params, **options: fgpt.lora_ga(params, batch_loss, **options),
}
"""Those after which base and adapters mean the base of before."""
FAMILIES = ("gpt2", "gpt2, fused", "gptj", "llama")


@cache
def base(family: str) -> fgpt.GPT:
    if family.startswith("gpt2"):
        return fgpt.fuse_qkv(tiny()) if "fused" in family else tiny()
    return save_and_load(hf_model(family))


def weight_at(params: Any, path: str) -> Any:
    """The weight of the layer at a path."""
    return get_at(params, path).w
