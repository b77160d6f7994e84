"""Laws of what stays as it is: in a file, and in memory."""

import hashlib
from collections.abc import Mapping
from math import isclose
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fgpt.adapters import Adapter, Adapters, DoRA, LoRA
from fgpt.checks.context import CheckResult, Context
from fgpt.checks.training import summarize
from fgpt.errors import InputError
from fgpt.io.peft.adapter_files import load_peft, pack, save_peft
from fgpt.io.serialization import load_adapters, save_adapters
from fgpt.tree import astype, leaves


def files(case: Context) -> CheckResult:
    """The adapters written and read back: numbers, strength, and dtypes, but that `load_peft` gives fp32."""
    with TemporaryDirectory() as folder:
        ours, peft = Path(folder) / "adapters.safetensors", Path(folder) / "peft"
        save_adapters(case.adapters, ours)
        formats, differ = "fgpt's format", differing_paths(case.adapters, load_adapters(ours, case.params))
        if peft_round_trip(case):
            save_peft(case.adapters, case.params, peft, "base")
            formats += " and PEFT's"
            differ += differing_paths(astype(case.adapters, torch.float32), load_peft(peft, case.params))
    compared = f"adapters with what a file of {formats} gives back, bit by bit"
    return CheckResult("save and load", compared, float(len(differ)), note=summarize(differ, "differs"))


def peft_round_trip(case: Context) -> bool:
    try:
        pack(case.adapters, case.params, "base")
    except InputError:
        return False
    return True


def differing_paths(expected: Adapters, read: Adapters) -> list[str]:
    """Paths where two sets of adapters are not the same to the bit."""
    return sorted(
        path
        for path in expected.keys() | read.keys()
        if path not in expected or path not in read or not same(expected[path], read[path])
    )


def same(a: Adapter, b: Adapter) -> bool:
    """Whether kind, numbers and strength are the same; two that differ in alpha and in being stabilised may be."""
    x, y = leaves({"": a}), leaves({"": b})
    if type(a) is not type(b) or x.keys() != y.keys():
        return False
    v, w = (each.lora if isinstance(each, DoRA) else each for each in (a, b))
    if isinstance(v, LoRA) and isinstance(w, LoRA) and not (isclose(v.scale, w.scale) and v.dropout == w.dropout):
        return False
    return all(x[path].dtype == y[path].dtype and torch.equal(x[path], y[path]) for path in x)


Digest = dict[str, bytes]


def digest(trees: Mapping[str, Any]) -> Digest:
    """What tells every leaf's bits from others, in 16 bytes: a copy would hold a large base twice."""

    def of(x: torch.Tensor) -> bytes:
        data: Any = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return hashlib.blake2b(data, digest_size=16).digest()

    return {path: of(x) for path, x in leaves(dict(trees)).items()}


def frozen_unchanged(before: Digest, after: Digest) -> CheckResult:
    differ = [path for path in before if before[path] != after[path]]
    compared = "base, adapters and batch before and after all of this, bit by bit"
    return CheckResult("frozen base", compared, float(len(differ)), note=summarize(differ, "was changed in place"))
