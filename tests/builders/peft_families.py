"""Modules of a family that PEFT adapts."""

import re
from typing import Any

import torch


def linear_modules(model: Any, pattern: str = ".*") -> list[str]:
    """The linear layers of theirs whose names match, but for a head that is the embedding table."""
    found = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and re.fullmatch(pattern, n)]
    return [n for n in found if n != "lm_head" or not model.config.tie_word_embeddings]


def norm_modules(model: Any) -> list[str]:
    return [n for n, m in model.named_modules() if "Norm" in type(m).__name__]
