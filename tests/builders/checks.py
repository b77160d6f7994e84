"""Models and batches that the doctor examines, and parts of fgpt replaced by broken ones."""

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import torch

import fgpt
from builders import tokens, with_noise
from fgpt.data.examples import Example
from fgpt.data.packing import collate
from fgpt.tree import astype

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {
        "norm_type": "rms", "activation": "silu", "gated_mlp": True, "biases": frozenset(), "rotary_dim": 32,
        "tie_word_embeddings": False, "n_kv": 1,
    },
    "neox": {"rotary_dim": 8, "parallel_residual": True, "tie_word_embeddings": False},
}  # fmt: skip
METHODS: dict[str, Callable[[fgpt.GPT], fgpt.Adapters]] = {
    "lora": lambda p: fgpt.lora(p, fgpt.key(1), 4, target=r"blocks\..*\.(q|v|up|down)", dropout=0.1),
    "dora": lambda p: fgpt.dora(p, fgpt.key(1), 4),
    "ia3": fgpt.ia3,
    "ln": lambda p: fgpt.trainable_leaves(p, r".*ln_.*"),
    "lora and ln": lambda p: fgpt.lora(p, fgpt.key(1), 4) | fgpt.trainable_leaves(p, r".*ln_.*"),
    "full": lambda p: fgpt.trainable_leaves(p, r"(?!.*(codes|absmax|code|offset)).*"),
}
CHECKS = [
    "finite loss", "padding", "packing", "batch composition", "batch size", "cache", "merge", "accumulation",
    "gradient flow", "first step", "determinism", "save and load", "frozen base",
]  # fmt: skip


def doctor_model(family: str = "gpt2", base: str = "fp32", layers: int = 1) -> fgpt.GPT:
    cfg = fgpt.Config(**{"n_layer": layers, "n_head": 2, "d_model": 64, "n_ctx": 24, "vocab_size": 31, "d_mlp": 128}
                      | FAMILIES[family])  # fmt: skip
    params = with_noise(fgpt.init(cfg, fgpt.key(0)), 0.1)
    if base in ("fp32", "bf16"):
        return params if base == "fp32" else astype(params, torch.bfloat16)
    return fgpt.quantize(params, base, target=r"blocks\..*\.(q|k|v|o|up|down)")  # pyright: ignore[reportArgumentType]


def doctor_batch(*rows: tuple[int, ...], label: int | None = None) -> fgpt.Batch:
    """Rows of documents of these lengths, each half a prompt; of token 30 there is none."""
    number = itertools.count()

    def document(length: int) -> Example:
        text = tuple(tokens(30, length, seed=next(number)).tolist())
        return Example.completion(text, length // 2) if label is None else Example.classification(text, label)

    return collate([[document(length) for length in row] for row in rows])


PACKED, PLAIN = doctor_batch((7, 9), (16,), (4, 5, 3)), doctor_batch((7,), (20,), (12,))


def failed_checks(*arguments: Any, **options: Any) -> tuple[set[str], set[str]]:
    """The checks that fail, and those that do not apply."""
    found = fgpt.run_checks(*arguments, **options)
    assert [x.check for x in found] == CHECKS
    assert all(x.note for x in found if x.holds is None)
    return {x.check for x in found if x.holds is False}, {x.check for x in found if x.holds is None}


def loaded_module(name: str) -> Any:
    return importlib.import_module(name)


Patch = Callable[[str, str, Callable[[Any], Any]], None]


def faulty_checks(
    rows: fgpt.Batch = PACKED, base: str = "fp32", method: str = "lora and ln", **options: Any
) -> set[str]:
    params = doctor_model(base=base)
    return failed_checks(params, METHODS[method](params), rows, **options)[0]
