"""A sample of test_matrix's cells on a tiny model of every other family, beside transformers' own model of it.

The reference is transformers' model, called with weights that are expanded from what the adapter means, and plain
autograd through it.
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import ROOT
from test_families import loaded, theirs
from test_matrix import BASES, EAGER, KINDS, TOLERANCE, TRANSFORMS, Loss, Point, error, reference_results
from torch import Tensor

import fgpt
from fgpt import families
from fgpt.families import mapping
from fgpt.tree import leaves, replace_at

SIZES: dict[str, dict[str, Any]] = {
    "gptj": {"n_embd": 64, "n_inner": 128},
    "neox": {"hidden_size": 64, "intermediate_size": 128},
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "qwen3": {"hidden_size": 64, "intermediate_size": 128},
}
CELLS = [
    ("LoRA", "fp32"),
    ("DoRA", "fp32"),
    ("IA3", "fp32"),
    ("full", "fp32"),
    ("LoRA and LayerNorm", "nf4"),
    ("DoRA", "nf4"),
    ("LoRA", "blockwise8"),
]


def model_of(name: str) -> tuple[Any, fgpt.GPT]:
    """transformers' model and ours, their weights smaller than `theirs` makes them, for flatter softmaxes."""
    model = theirs(name, **SIZES[name])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.8 if name == "gptj" else 0.5)
    return model, loaded(model)


def reference_over(frozen: fgpt.GPT, model: Any) -> Loss:
    plain = fgpt.merge(frozen, base="dequantized")
    family, weights = families.family_of(frozen.cfg), leaves(plain)
    # a file's name, and a module's
    place = {} if hasattr(model, "embed_out") else {"embed_out.weight": "lm_head.weight"}

    def loss(adapters: Any, batch: fgpt.Batch, seed: Tensor) -> Tensor:
        new = dict(weights)
        for path, x in adapters.items():
            if isinstance(x, Tensor):
                new[path] = x
        for path, x in adapters.items():
            if isinstance(x, Tensor):
                continue
            w = new[f"{path}.w"]
            if isinstance(x, fgpt.IA3):
                w = w if x.col is None else w * x.col
                w = w if x.row is None else x.row[:, None] * w
                if x.row is not None and f"{path}.b" in new:
                    new[f"{path}.b"] = x.row * new[f"{path}.b"]
            else:
                v = x.lora if isinstance(x, fgpt.DoRA) else x
                w = w + v.alpha / len(v.a) * v.b @ v.a
                if isinstance(x, fgpt.DoRA):
                    w = x.m[:, None] * w / w.norm(dim=1, keepdim=True).detach()
            new[f"{path}.w"] = w
        state = {place.get(path, path): x for path, x in mapping.to_hf(replace_at(plain, new), family).items()}
        rows = batch.tokens.view(-1, batch.tokens.shape[-1])
        out = torch.func.functional_call(model, state, (rows,), {"use_cache": False}).logits
        log_p = out.view(*batch.tokens.shape, -1).log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
        return -(batch.weights * log_p).sum() / batch.weights.sum() - math.log(frozen.cfg.vocab_size)

    return loss


def wrong(name: str, kind: str, on: str, transforms: Iterable[str]) -> dict[str, float]:
    """The transforms of a cell that do not give what they are to give."""
    model, plain = model_of(name)
    frozen = BASES[on](plain)
    reference = reference_over(frozen, model)
    p = Point(kind, frozen, reference)
    want = reference_results(reference, p)
    far = {transform: error(TRANSFORMS[transform](frozen, p), want[transform]) for transform in transforms}
    return {transform: x for transform, x in far.items() if x > TOLERANCE[on]}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("kind", "on"), CELLS)
@pytest.mark.parametrize("name", SIZES)
def test_eager(name: str, kind: str, on: str):
    assert kind in KINDS
    assert not wrong(name, kind, on, EAGER)


COMPILED = """
import json, sys
sys.path.insert(0, "tests")
from test_matrix_families import wrong
cells = ("gptj", "nf4"), ("llama", "fp32")
print(json.dumps({name: wrong(name, "LoRA", on, ["compile(grad)"]) for name, on in cells}))
"""


@pytest.mark.slow
def test_compiled():
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr[-3000:]
    assert json.loads(done.stdout) == {"gptj": {}, "llama": {}}


def test_a_wrong_model_is_noticed():
    """The cells of a model whose rotation has another base differ by far more than their tolerance."""
    model, plain = model_of("llama")
    frozen = BASES["fp32"](plain)
    reference = reference_over(frozen, model)
    p = Point("LoRA", frozen, reference)
    want = reference_results(reference, p)
    odd = replace(frozen, cfg=replace(frozen.cfg, rope_theta=500.0))
    for transform in ("grad", "jvp(grad)", "vmap(grad)"):
        assert error(TRANSFORMS[transform](odd, p), want[transform]) > 100 * TOLERANCE["fp32"]
