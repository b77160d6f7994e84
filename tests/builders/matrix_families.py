"""Cells of the matrix on a tiny model of every other family."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import fgpt
from builders.hf_models import hf_model, save_and_load
from builders.matrix import BASES, TOLERANCE, TRANSFORMS, Loss, Point, error, reference_results
from fgpt import families
from fgpt.families import mapping
from fgpt.tree import leaves, replace_at

SIZES: dict[str, dict[str, Any]] = {
    "gptj": {"n_embd": 64, "n_inner": 128},
    "neox": {"hidden_size": 64, "intermediate_size": 128},
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "qwen3": {"hidden_size": 64, "intermediate_size": 128},
}


FAMILY_BASES = BASES | {"rotated nf4": lambda p: fgpt.quantize(p, "nf4", rotate=True)}


"""Rotated int8 rounds what a layer reads, which transformers' model does not: the rotation is that of nf4."""


def model_of_family(name: str) -> tuple[Any, fgpt.GPT]:
    """transformers' model and ours, their weights smaller than `theirs` makes them, for flatter softmaxes."""
    model = hf_model(name, **SIZES[name])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.8 if name == "gptj" else 0.5)
    return model, save_and_load(model)


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


def wrong_cells_of_family(name: str, kind: str, on: str, transforms: Iterable[str]) -> dict[str, float]:
    """The transforms of a cell that do not give what they are to give."""
    model, plain = model_of_family(name)
    frozen = FAMILY_BASES[on](plain)
    reference = reference_over(frozen, model)
    p = Point(kind, frozen, reference)
    want = reference_results(reference, p)
    far = {transform: error(TRANSFORMS[transform](frozen, p), want[transform]) for transform in transforms}
    return {transform: x for transform, x in far.items() if x > TOLERANCE[on.removeprefix("rotated ")]}
