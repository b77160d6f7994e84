"""What tests are made of: tiny models with every weight in play, tokens, comparisons of trees."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

import fgpt
from fgpt.model import abstract_params
from fgpt.tree import leaves, tree_map

ROOT = Path(__file__).parents[2]
SharedData = Callable[[str], Path]
"""The fixture `shared_data`: from the name of a file or folder of the development data to its path."""


def tokens(vocab: int, *size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab, size, generator=torch.Generator().manual_seed(seed))


def with_noise(tree: Any, std: float = 0.15, seed: int = 0) -> Any:
    """`tree` with noise on every leaf: no bias is zero, no norm is one, no LoRA is the identity."""
    rng = torch.Generator().manual_seed(seed)
    return tree_map(lambda x: x + std * torch.randn(x.shape, generator=rng, dtype=x.dtype), tree)


def tiny(**overrides: Any) -> fgpt.GPT:
    fields: dict[str, Any] = {"n_layer": 2, "n_head": 2, "d_model": 16, "n_ctx": 24, "vocab_size": 31, "d_mlp": 40}
    return with_noise(fgpt.init(fgpt.Config(**fields | overrides), fgpt.key(0)))


def gpt2_shape(n_layer: int, n_head: int, d_model: int) -> fgpt.GPT:
    """GPT-2 at its real shape, without storage."""
    return abstract_params(fgpt.Config(n_layer, n_head, d_model, 1024, 50257, 4 * d_model))


def hf_gpt2(seed: int = 0, **overrides: Any) -> GPT2LMHeadModel:
    """transformers' GPT-2 with random weights in every place: biases and norms too, ten times the usual spread."""
    fields: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 24, "vocab_size": 31}
    ends = {"bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(**fields | ends | overrides, attn_implementation="eager")).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=rng) + (".ln_" in name and name.endswith("weight")))
    return model


def load_hf_model(model: GPT2LMHeadModel, folder: Path, **options: Any) -> fgpt.GPT:
    """The same model as a params tree, through the files that transformers writes."""
    model.save_pretrained(folder)
    return fgpt.load(str(folder), **options)


def same(a: Any, b: Any) -> bool:
    """Whether two trees have the same paths, and bitwise the same leaves."""
    x, y = leaves(a), leaves(b)
    return x.keys() == y.keys() and all(x[p].dtype == y[p].dtype and torch.equal(x[p], y[p]) for p in x)


def close(a: Any, b: Any, atol: float, rtol: float = 0.0) -> None:
    """Asserts that two trees (or tensors) have the same paths and close leaves."""
    x, y = leaves({"": a}), leaves({"": b})
    assert x.keys() == y.keys()
    for path in x:
        torch.testing.assert_close(x[path], y[path], atol=atol, rtol=rtol, msg=lambda m, p=path: f"{p}: {m}")


def stack_trees(trees: list[Any]) -> Any:
    """Trees of equal structure as one, its leaves stacked: what vmap maps over."""
    return tree_map(lambda *x: torch.stack(x), *trees)


class LargestTensor(TorchDispatchMode):
    """The most elements that a new tensor had, and every new tensor's shape. Views are not new."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.shapes = 0, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in old:
                self.numel = max(self.numel, x.numel())
                self.shapes.append(tuple(x.shape))
        return out
