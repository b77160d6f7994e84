"""Parameters with two names; what is a layer; names are a bijection."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import hf_gpt2, with_noise
from builders.lifted_modules import TiedModule, X, assert_near, native_grads, path_of, with_random_params
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad
from transformers.pytorch_utils import Conv1D

import fgpt
from fgpt.layers import weight_matrices
from fgpt.tree import leaves, num_elements


def test_what_is_tied_stays_one_leaf_at_its_first_name():
    module = with_random_params(TiedModule())
    params, apply = fgpt.from_module(module)
    assert list(leaves(params)) == ["table.w", "first.w", "first.b", "other.weight.w", "head.bias"]
    grads = grad(lambda a: apply(fgpt.adapt(params, a), X).square().mean())(fgpt.trainable_leaves(params))
    assert_near(list(grads.values()), list(native_grads(module, lambda m: m(X).square().mean()).values()))
    moved = with_noise(fgpt.lora(params, fgpt.key(0), 2, target="table|first|other.weight"))
    expected = copy.deepcopy(module)
    with torch.no_grad():
        for name in moved:
            x: Any = moved[name]
            weight = expected.get_parameter(f"{name.removesuffix('.weight')}.weight")
            weight += x.scale * x.b @ x.a  # the one Parameter, wherever it stands
    assert_near(apply(fgpt.adapt(params, moved), X), expected(X).detach())
    with pytest.raises(fgpt.InputError, match="expected a linear layer, got Matrix"):
        fgpt.ia3(params, "other.weight", None)  # its bias is the first's, and would not be scaled


def test_the_head_of_gpt2_goes_by_the_name_of_its_table(gpt2: nn.Module):
    params, _ = fgpt.from_module(gpt2)
    assert "lm_head" not in params
    with pytest.raises(fgpt.InputError, match="selector 'lm_head' matches no path"):
        fgpt.lora(params, fgpt.key(0), target="lm_head")
    untied = hf_gpt2(tie_word_embeddings=False)
    assert {"transformer.wte", "lm_head"} < set(weight_matrices(fgpt.from_module(untied)[0]))


class More(nn.Linear):
    """A Linear and more: no layer that IA3 could scale by its weight and bias."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class Gated(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.gate = nn.Linear(4, 1, bias=False)


class Twice(nn.Module):
    """One parameter under two names of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(3))
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return x * self.a * self.b


def test_one_parameter_under_two_names_of_one_module():
    params, apply = fgpt.from_module(Twice())
    x = torch.tensor([1.0, 2.0, 3.0])
    assert list(params) == ["a"]
    assert torch.equal(apply({"a": 2 * params["a"]}, x), 4 * x)
    assert torch.equal(grad(lambda p: apply(p, x).sum())(params)["a"], 2 * x)


@pytest.mark.parametrize(
    ("make", "paths"),
    [
        (lambda: nn.Linear(3, 4), ["weight.w", "bias"]),  # a layer has a path, and the module itself has none
        (lambda: nn.Sequential(nn.Linear(3, 4, bias=False)), ["0.w"]),
        (lambda: nn.Sequential(Conv1D(4, 3)), ["0.w", "0.b"]),
        (lambda: nn.Sequential(More()), ["0.weight.w", "0.bias", "0.gain"]),
        (lambda: nn.Sequential(Gated()), ["0.weight.w", "0.bias", "0.gate.w"]),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3)), ["0.weight", "0.bias"]),
        (
            lambda: nn.Sequential(parametrize_norm()),
            ["0.bias", *(f"0.parametrizations.weight.original{i}.w" for i in (0, 1))],
        ),
        (lambda: nn.ReLU(), []),
    ],
)
def test_what_is_a_layer(make: Callable[[], nn.Module], paths: list[str]):
    assert list(leaves(fgpt.from_module(make())[0])) == paths


def parametrize_norm() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))


@given(
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    kinds=st.lists(st.sampled_from(["linear", "bare", "conv1d", "norm", "deeper"]), min_size=4, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_lift_is_a_bijection_of_parameters(widths: list[int], kinds: list[str], seed: int):
    """Other numbers in the tree are the module with those numbers loaded, to the bit: any stack of layers."""

    def layer(kind: str, inp: int, out: int) -> nn.Module:
        built = Conv1D(out, inp) if kind == "conv1d" else nn.Linear(inp, out, bias=kind != "bare")
        if kind == "deeper":
            return nn.ModuleDict({"x": built})["x"] if inp == out else nn.Sequential(nn.Tanh(), nn.Sequential(built))
        return nn.Sequential(built, nn.LayerNorm(out)) if kind == "norm" else built

    module = nn.Sequential(*(layer(*x) for x in zip(kinds, widths, widths[1:])))
    params, apply = fgpt.from_module(module)
    assert len(leaves(params)) == len(list(module.parameters()))
    assert num_elements(params) == sum(x.numel() for x in module.parameters())
    moved = with_noise(params, seed=seed)
    other, found = copy.deepcopy(module), leaves(moved)
    with torch.no_grad():
        for name, x in other.named_parameters():
            new = found[path_of(module, name)]
            turned = isinstance(other.get_submodule(name.rpartition(".")[0]), Conv1D) and x.ndim == 2
            x.copy_(new.T if turned else new)
    x = torch.randn(3, widths[0], generator=fgpt.key(seed))
    assert torch.equal(apply(moved, x), other(x))
    assert torch.equal(apply(params, x), module(x))
