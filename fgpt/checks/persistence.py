"""Checks that files give back what was saved, and that nothing in memory changes."""

import hashlib
from collections.abc import Mapping
from math import isclose
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fgpt.adapter_dora import DoRA
from fgpt.adapter_lora import LoRA
from fgpt.adapter_types import Adapter, Adapters
from fgpt.checks.context import CheckResult, Context
from fgpt.checks.training import summarize
from fgpt.errors import InputError
from fgpt.io.peft.adapter_files import load_peft, pack, save_peft
from fgpt.io.serialization import load_adapters, save_adapters
from fgpt.tree import astype, leaves


def save_and_load(context: Context) -> CheckResult:
    """Adapters saved and loaded: values, scale, and dtypes, except that `load_peft` gives fp32."""
    with TemporaryDirectory() as folder:
        file, peft_folder = Path(folder) / "adapters.safetensors", Path(folder) / "peft"
        save_adapters(context.adapters, file)
        formats, different = "fgpt's format", different_paths(context.adapters, load_adapters(file, context.params))
        if has_peft_format(context):
            save_peft(context.adapters, context.params, peft_folder, "base")
            loaded = load_peft(peft_folder, context.params)
            formats += " and PEFT's"
            different += different_paths(astype(context.adapters, torch.float32), loaded)
    compared = f"adapters with those loaded from a file of {formats}, bit by bit"
    return CheckResult("save and load", compared, float(len(different)), note=summarize(different, "differs"))


def has_peft_format(context: Context) -> bool:
    """Whether PEFT can represent the adapters."""
    try:
        pack(context.adapters, context.params, "base")
    except InputError:
        return False
    return True


def different_paths(expected: Adapters, actual: Adapters) -> list[str]:
    """Paths at which two sets of adapters are not equal to the bit."""
    paths: list[str] = []
    for path in sorted(expected.keys() | actual.keys()):
        if path not in expected or path not in actual or not is_equal(expected[path], actual[path]):
            paths.append(path)
    return paths


def is_equal(a: Adapter, b: Adapter) -> bool:
    """Whether kind, values, scale and dropout are equal. Two with different alpha and rank stabilization may be."""
    a_leaves, b_leaves = leaves({"": a}), leaves({"": b})
    if type(a) is not type(b) or a_leaves.keys() != b_leaves.keys():
        return False
    x, y = (adapter.lora if isinstance(adapter, DoRA) else adapter for adapter in (a, b))
    if isinstance(x, LoRA) and isinstance(y, LoRA) and not (isclose(x.scale, y.scale) and x.dropout == y.dropout):
        return False
    return all(x.dtype == b_leaves[path].dtype and torch.equal(x, b_leaves[path]) for path, x in a_leaves.items())


Digest = dict[str, bytes]


def digest(trees: Mapping[str, Any]) -> Digest:
    """A 16-byte hash of every leaf's bits: a copy would need the memory of a second base."""

    def leaf_digest(x: torch.Tensor) -> bytes:
        data: Any = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return hashlib.blake2b(data, digest_size=16).digest()

    return {path: leaf_digest(x) for path, x in leaves(dict(trees)).items()}


def frozen_base(before: Digest, after: Digest) -> CheckResult:
    """No leaf was changed in place."""
    different = [path for path in before if before[path] != after[path]]
    compared = "base, adapters and batch before and after all checks, bit by bit"
    note = summarize(different, "was changed in place")
    return CheckResult("frozen base", compared, float(len(different)), note=note)
