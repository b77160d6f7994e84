"""Modules that are lifted, and plain autograd of them."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fgpt
from builders import close, tokens
from fgpt.tree import leaves

X = tokens(31, 3, 9)
MATRICES = r"transformer\.h\.\d+\.(attn|mlp)\.c_\w+"
FRESH: dict[str, Callable[[Any, str], fgpt.Adapters]] = {
    "lora": lambda p, target: fgpt.lora(p, fgpt.key(0), 4, target=target),
    "dora": lambda p, target: fgpt.dora(p, fgpt.key(0), 4, target=target),
    "ia3": lambda p, target: fgpt.ia3(p, rows=target, cols=target),
}


def assert_near(got: Any, expected: Any, rel: float = 1e-5) -> None:
    """Close, as a part of the largest number of each leaf."""
    x, y = leaves({"": got}), leaves({"": expected})
    assert x.keys() == y.keys()
    for path in x:
        close({path: x[path].double()}, {path: y[path].double()}, rel * y[path].abs().max().item() + 1e-9)


def with_random_params(module: nn.Module, seed: int = 0) -> nn.Module:
    """`module` in eval mode, with noise on every parameter."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in module.parameters():
            x.add_(0.2 * torch.randn(x.shape, generator=rng))
    return module.eval()


def path_of(module: nn.Module, name: str) -> str:
    """Where a parameter lies: by hand, as the docstring says it."""
    above, _, last = name.rpartition(".")
    x, part = module.get_parameter(name), module.get_submodule(above)
    if above and isinstance(part, nn.Linear | nn.Embedding | Conv1D):
        return f"{above}.{'w' if last == 'weight' else 'b'}"
    return f"{name}.w" if x.ndim == 2 else name


def native_grads(module: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """backward() on a copy, by our paths and turned as our leaves are."""
    module = copy.deepcopy(module)
    loss(module).backward()
    grads = {}
    for name, x in module.named_parameters():
        turned = isinstance(module.get_submodule(name.rpartition(".")[0]), Conv1D) and x.ndim == 2
        grads[path_of(module, name)] = torch.zeros_like(x) if x.grad is None else x.grad.T if turned else x.grad
    return grads


def gpt2_loss(apply: Callable[..., Any]) -> Tensor:
    return F.cross_entropy(apply(input_ids=X).logits[:, :-1].flatten(0, 1), X[:, 1:].flatten())


def lifted_loss(params: Any, apply: Any) -> Callable[[fgpt.Adapters], Tensor]:
    return lambda a: gpt2_loss(lambda **kw: apply(fgpt.adapt(params, a), **kw))


class Convolutions(nn.Module):
    """A picture of tokens: convolutions and BatchNorm, then a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(1, 6, 3), nn.BatchNorm1d(6), nn.Tanh(), nn.Conv1d(6, 4, 3), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x[:, None].float() / 31))


LABELS = torch.tensor([0, 2, 1])


def mean_loss(module: Callable[[Tensor], Tensor]) -> Tensor:
    return F.cross_entropy(module(X), LABELS)


class TiedModule(nn.Module):
    """A table that is a head with a bias, one module under two names, and one bias in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first = nn.Embedding(31, 8), nn.Linear(8, 8)
        self.again, self.other, self.head = self.first, nn.Linear(8, 8), nn.Linear(8, 31)
        self.other.bias, self.head.weight = self.first.bias, self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.other(torch.tanh(self.again(torch.tanh(self.first(self.table(x)))))))
