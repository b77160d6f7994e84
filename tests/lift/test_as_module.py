"""A function of a tree as a module: itself, its derivatives, and nothing that a module may do reaches the tree."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import close, same, tiny, tokens, with_noise
from builders.lifted_modules import LABELS, TiedModule, X, with_random_params
from builders.transforms import BASE
from builders.trees import INTEGERS, plain, trees
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import fgpt
from fgpt.kernels.quantized_linear import QUANTIZED
from fgpt.tree import astype, leaves, replace_at, tree_map, walk

TEXT = tokens(31, 2, 8)
UNION = r".*ln_.*|.*\.b"
TREES: dict[str, Any] = {
    "lora": with_noise(fgpt.lora(BASE, fgpt.key(0), 2)),
    "dora": with_noise(fgpt.dora(BASE, fgpt.key(0), 2)),
    "ia3": with_noise(fgpt.ia3(BASE)),
    "tokens": with_noise(fgpt.trainable_tokens(BASE, [3, 5])),
    "union": with_noise(fgpt.lora(BASE, fgpt.key(0), 2, dropout=0.1) | fgpt.trainable_leaves(BASE, UNION)),
}
TENSORS = INTEGERS | st.floats(-9, 9, width=32).map(torch.tensor)


def logits(adapters: Any, text: Tensor) -> Tensor:
    return fgpt.apply(fgpt.adapt(BASE, adapters), text)


def snapshot(tree: Any) -> Any:
    return tree_map(torch.clone, tree)


@given(trees(TENSORS))
def test_any_tree_comes_back_as_it_is(tree: Any):
    assume(leaves(tree))
    module = fgpt.as_module(lambda x: x, tree)
    assert plain(module()) == plain(tree)
    assert set(module.state_dict()) == set(leaves(tree))
    floats = {path for path, x in leaves(tree).items() if x.is_floating_point()}
    assert {name for name, _ in module.named_parameters()} == floats
    assert all(x.requires_grad for x in module.parameters())


@pytest.mark.parametrize("kind", TREES)
def test_the_module_is_the_function(kind: str):
    tree = TREES[kind]
    module = fgpt.as_module(logits, tree)
    assert torch.equal(module(TEXT), logits(tree, TEXT))
    module(TEXT).square().mean().backward()
    expected = grad(lambda a: logits(a, TEXT).square().mean())(tree)
    close({name: x.grad for name, x in module.named_parameters()}, dict(leaves(expected)), 1e-6)
    params, apply = fgpt.from_module(module)
    assert torch.equal(apply(params, TEXT), logits(tree, TEXT))


@pytest.mark.parametrize("make", [TiedModule, lambda: nn.TransformerEncoderLayer(9, 3, 16, batch_first=True)])
def test_it_is_the_inverse_of_from_module(make: Any):
    torch.manual_seed(0)
    module = with_random_params(make())
    x = X if isinstance(module, TiedModule) else torch.randn(2, 3, 9)
    params, apply = fgpt.from_module(module)
    got = fgpt.as_module(apply, params)
    torch.testing.assert_close(got(x), module(x))
    got(x).sin().sum().backward()
    module(x).sin().sum().backward()
    grads = sum(float(p.grad.square().sum()) for p in got.parameters())  # pyright: ignore
    assert grads == pytest.approx(sum(float(p.grad.square().sum()) for p in module.parameters()), rel=1e-4)


def test_transforms_go_through_functional_call():
    tree = TREES["union"]
    module = fgpt.as_module(logits, tree)
    params = {name: x.detach() for name, x in module.named_parameters()}

    def loss(p: Any, text: Tensor) -> Tensor:
        return functional_call(module, p, (text,)).square().mean()

    def expected(a: Any, text: Tensor) -> Tensor:
        return logits(a, text).square().mean()

    each = vmap(grad(loss), in_dims=(None, 0))(params, TEXT)
    close(each, dict(leaves(vmap(grad(expected), in_dims=(None, 0))(tree, TEXT))), 1e-6)
    _, hv = jvp(lambda p: grad(loss)(p, TEXT), (params,), (params,))
    close(hv, dict(leaves(jvp(lambda a: grad(expected)(a, TEXT), (tree,), (tree,))[1])), 1e-5)


def test_nothing_reaches_the_tree():
    tree = {
        "adapters": TREES["lora"],
        "base": fgpt.quantize(tiny(d_model=64, d_mlp=64), "nf4"),
        "steps": torch.tensor(3),
    }
    before = snapshot(tree)
    module = fgpt.as_module(lambda t: t, tree)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    sum(x.sum() for x in module.parameters()).backward()  # pyright: ignore
    optimizer.step()
    module.load_state_dict({name: x + 1 for name, x in module.state_dict().items()})
    for x in (*module.parameters(), *module.buffers()):
        x.data.zero_()
    assert same(tree, before)
    assert not same(module(), before)


@pytest.mark.parametrize("to", ["nf4", "int8"])
def test_codes_and_scales_are_buffers_and_keep_their_dtype(to: Any):
    """`module.to(dtype)` does what `astype` does."""
    params = fgpt.quantize(tiny(d_model=64, d_mlp=64), to)
    module = fgpt.as_module(fgpt.apply, params)
    quantized = {f"{path}." for path, x in walk(params) if isinstance(x, QUANTIZED)}
    frozen = {path for path in leaves(params) if any(path.startswith(start) for start in quantized)}
    assert frozen
    assert {name for name, _ in module.named_buffers()} == frozen
    assert {name for name, _ in module.named_parameters()} == leaves(params).keys() - frozen
    assert torch.equal(module(TEXT), fgpt.apply(params, TEXT))
    half = astype(params, torch.bfloat16)
    assert torch.equal(module.bfloat16()(TEXT), fgpt.apply(half, TEXT))
    assert same(replace_at(params, module.state_dict()), half)
    module.to("meta")
    for name, x in module.state_dict().items():
        assert (x.device.type, x.dtype) == ("meta", leaves(half)[name].dtype)
    matrix = params.blocks[0].attn.q.w
    alone = fgpt.as_module(fgpt.dense, matrix).double()
    assert list(alone.parameters()) == []
    assert torch.equal(alone(), fgpt.dense(matrix))


def test_a_copy_is_independent():
    module = fgpt.as_module(logits, TREES["lora"])
    other = copy.deepcopy(module)
    expected = module(TEXT)
    with torch.no_grad():
        for x in other.parameters():
            x.zero_()
    assert torch.equal(module(TEXT), expected)
    assert torch.equal(other(TEXT), fgpt.apply(BASE, TEXT))


def test_state_dicts_are_files_and_trees(tmp_path: Path):
    trained = fgpt.as_module(logits, TREES["dora"])
    save_file(trained.state_dict(), tmp_path / "adapters.safetensors")
    module = fgpt.as_module(logits, tree_map(torch.zeros_like, TREES["dora"]))
    module.load_state_dict(load_file(tmp_path / "adapters.safetensors"))
    assert torch.equal(module(TEXT), trained(TEXT))
    assert same(replace_at(TREES["dora"], module.state_dict()), TREES["dora"])


def test_weights_of_another_layout_are_files_too(tmp_path: Path):
    """A transposed view, as `from_module` gives Conv1D's weights, is stored in the order of its rows."""
    w = torch.arange(6.0).view(2, 3).T
    module = fgpt.as_module(lambda t: t["w"], {"w": w})
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    assert torch.equal(load_file(tmp_path / "w.safetensors")["w"], w)


def test_it_trains_as_any_module():
    torch.manual_seed(0)
    params, apply = fgpt.from_module(with_random_params(TiedModule()))
    module = fgpt.as_module(
        lambda a, x: apply(fgpt.adapt(params, a), x)[:, -1], fgpt.lora(params, fgpt.key(0), 2, target="first")
    )
    optimizer, losses = torch.optim.Adam(module.parameters(), lr=0.05), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(X), LABELS)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"w": torch.ones(2), "lr": 0.1}, "got a dict with 2 leaves, of which 1 are tensors with a path"),
        (torch.ones(2), "got a Tensor with 1 leaves, of which 0 are tensors with a path"),
        ({}, "a dict with 0 leaves"),
        ({1: torch.ones(2), "1": torch.ones(2)}, "a dict with 2 leaves, of which 1 are tensors with a path"),
        (
            {"type": torch.ones(2)},
            r"'type' cannot be a name in an nn.Module \(attribute 'type' already exists\): rename",
        ),
        ({"": torch.ones(2)}, "'' cannot be a name in an nn.Module"),
        ({"a": torch.ones(2), "a.b": torch.ones(2)}, r"'a\.b' cannot be a name"),
        ({"modules": {"w": torch.ones(2)}}, r"'modules\.w' cannot be a name"),
    ],
)
def test_what_is_no_tree_of_tensors_is_named(tree: Any, message: str):
    with pytest.raises(fgpt.InputError, match=message) as caught:
        fgpt.as_module(lambda t: t, tree)
    assert "\n" not in str(caught.value)
