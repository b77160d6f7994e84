"""Bases on which whole modules are tuned."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft

from builders import hf_gpt2
from builders.hf_models import hf_model

TUNED_BASES: dict[str, Callable[[], Any]] = {
    "gpt2": hf_gpt2,
    "gpt2, apart": lambda: hf_gpt2(tie_word_embeddings=False),
    "gptj": lambda: hf_model("gptj"),
    "neox, tied": lambda: hf_model("neox, tied"),
    "llama": lambda: hf_model("llama"),
    "llama, tied": lambda: hf_model("llama, tied"),
}


def family_of_base(name: str) -> str:
    return name.partition(",")[0]


def save_base(name: str, at: Path) -> Any:
    """The model from its own folder, which PEFT then knows as its base."""
    model = TUNED_BASES[name]()
    model.save_pretrained(at)
    model.config._name_or_path = model.name_or_path = str(at)
    return model


def config(name: str, **options: Any) -> Any:
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM"} | options)
