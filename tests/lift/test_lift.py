"""Any module, lifted: against itself, plain autograd on torch's own parametrisations, our GPT-2, and peft."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from builders import close, hf_gpt2, load_hf_model, same, stack_trees, tokens, with_noise
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

import fgpt
from fgpt.adapters import weight_matrices
from fgpt.tree import leaves, num_elements, replace_at, tree_map

X = tokens(31, 3, 9)
MATRICES = r"transformer\.h\.\d+\.(attn|mlp)\.c_\w+"
FRESH: dict[str, Callable[[Any, str], fgpt.Adapters]] = {
    "lora": lambda p, target: fgpt.lora(p, fgpt.key(0), 4, target=target),
    "dora": lambda p, target: fgpt.dora(p, fgpt.key(0), 4, target=target),
    "ia3": lambda p, target: fgpt.ia3(p, rows=target, cols=target),
}


def near(got: Any, expected: Any, rel: float = 1e-5) -> None:
    """Close, as a part of the largest number of each leaf."""
    x, y = leaves({"": got}), leaves({"": expected})
    assert x.keys() == y.keys()
    for path in x:
        close({path: x[path].double()}, {path: y[path].double()}, rel * y[path].abs().max().item() + 1e-9)


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """`module` in eval mode, with noise on every parameter."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in module.parameters():
            x.add_(0.2 * torch.randn(x.shape, generator=rng))
    return module.eval()


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in module.state_dict().items()}


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


# -------------------------------------------------------------------------------------------------- transformers' GPT-2


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    return hf_gpt2()


def gpt2_loss(apply: Callable[..., Any]) -> Tensor:
    return F.cross_entropy(apply(input_ids=X).logits[:, :-1].flatten(0, 1), X[:, 1:].flatten())


def lifted_loss(params: Any, apply: Any) -> Callable[[fgpt.Adapters], Tensor]:
    return lambda a: gpt2_loss(lambda **kw: apply(fgpt.adapt(params, a), **kw))


def test_gpt2_lifted_is_gpt2_to_the_bit(gpt2: nn.Module):
    params, apply = fgpt.from_module(gpt2)
    assert torch.equal(apply(params, input_ids=X).logits, gpt2(input_ids=X).logits)
    assert torch.equal(apply(params, X)[0], gpt2(X)[0])
    assert set(leaves(params)) == {path_of(gpt2, name) for name, _ in gpt2.named_parameters()}
    assert num_elements(params) == sum(x.numel() for x in gpt2.parameters())
    assert {x.untyped_storage().data_ptr() for x in leaves(params).values()} == {
        x.untyped_storage().data_ptr() for x in gpt2.parameters()
    }
    assert not any(x.requires_grad for x in leaves(params).values())
    assert weight_matrices(params)["transformer.h.1.mlp.c_fc"].shape == (64, 16)  # [out, in]


def test_every_gradient_of_gpt2_is_its_own(gpt2: nn.Module):
    params, apply = fgpt.from_module(gpt2)
    grads = grad(lifted_loss(params, apply))(fgpt.trainable_leaves(params))
    near(grads, native_grads(gpt2, gpt2_loss), 1e-6)


@pytest.mark.parametrize("method", FRESH)
def test_fresh_adapters_change_no_bit_and_merge_to_the_params(gpt2: nn.Module, method: str):
    params, apply = fgpt.from_module(gpt2)
    adapted = fgpt.adapt(params, FRESH[method](params, MATRICES))
    assert torch.equal(apply(adapted, X).logits, gpt2(X).logits)
    assert same(fgpt.merge(adapted), params)
    moved = fgpt.adapt(params, with_noise(FRESH[method](params, MATRICES)))
    assert torch.equal(apply(fgpt.merge(moved), X).logits, apply(moved, X).logits)
    assert not torch.allclose(apply(moved, X).logits, gpt2(X).logits, atol=1e-2)


NAMES = {"attn.c_attn": "attn.qkv", "attn.c_proj": "attn.o", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}


@pytest.mark.parametrize("method", FRESH)
def test_adapters_on_gpt2_are_those_on_our_own(gpt2: Any, method: str, tmp_path: Path):
    """The factored reading of our model, and the merged one of theirs; LoRA and DoRA on the tied table too."""
    own, (params, apply) = fgpt.fuse_qkv(load_hf_model(gpt2, tmp_path)), fgpt.from_module(gpt2)
    tables = "" if method == "ia3" else "|transformer\\.w[tp]e"
    theirs = with_noise(FRESH[method](params, MATRICES + tables) | fgpt.trainable_leaves(params, r".*ln_f\.bias"))

    def path(name: str) -> str:
        name = name.removeprefix("transformer.").replace("h.", "blocks.").replace("ln_f.bias", "ln_f.b")
        for old, new in NAMES.items():
            name = name.replace(old, new)
        return name

    mine: Any = {path(name): x for name, x in theirs.items()}
    near(apply(fgpt.adapt(params, theirs), X).logits, fgpt.apply(fgpt.adapt(own, mine), X))
    batch = fgpt.Batch(X[:, :-1], X[:, 1:], torch.ones(3, 8))
    expected = grad(lambda a: fgpt.loss(fgpt.adapt(own, a), batch))(mine)
    got = grad(lifted_loss(params, apply))(theirs)
    near({path(name): x for name, x in got.items()}, expected)


@pytest.mark.parametrize("dora", [False, True])
def test_lora_and_dora_on_gpt2_are_pefts(gpt2: Any, dora: bool):
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True, use_dora=dora
    )
    model = peft.get_peft_model(copy.deepcopy(gpt2), config).eval()
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    with torch.no_grad():
        rng = torch.Generator().manual_seed(1)
        for x in trained.values():
            x.add_(0.1 * torch.randn(x.shape, generator=rng))
    params, apply = fgpt.from_module(gpt2)
    adapters: Any = {}
    for path in (p for p in weight_matrices(params) if ".c_" in p):
        a, b, *m = (x for name, x in trained.items() if f"{path}.lora_" in name)
        lora = fgpt.LoRA(a.detach(), b.detach(), 8.0)
        adapters[path] = fgpt.DoRA(lora, m[0].detach()) if dora else lora
    assert len(leaves(adapters)) == len(trained)
    near(apply(fgpt.adapt(params, adapters), X).logits, model(input_ids=X).logits.detach())
    gpt2_loss(model).backward()
    got = leaves(grad(lifted_loss(params, apply))(adapters))
    near(list(got.values()), [x.grad for x in trained.values()])


def test_a_model_that_peft_has_wrapped_is_a_module_too(gpt2: nn.Module):
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(gpt2), config).eval()  # pyright: ignore
    params, apply = fgpt.from_module(model)
    grads = grad(lifted_loss(params, apply))(fgpt.trainable_leaves(params, r".*lora_[AB].*"))
    gpt2_loss(model).backward()
    expected = [x.grad for x in model.parameters() if x.requires_grad]
    near(list(leaves(grads).values()), expected)


def test_gpt2_under_the_transforms(gpt2: nn.Module):
    """Per-example gradients, an exact Hessian-vector product, an ensemble."""
    params, apply = fgpt.from_module(gpt2)
    adapters = with_noise(fgpt.lora(params, fgpt.key(0), 2, target=MATRICES))

    def loss(a: Any, row: Tensor) -> Tensor:
        return F.cross_entropy(apply(fgpt.adapt(params, a), row[None]).logits[0, :-1], row[1:])

    each = vmap(grad(loss), in_dims=(None, 0))(adapters, X)
    near(each, stack_trees([grad(loss)(adapters, row) for row in X]))
    several = [with_noise(adapters, seed=i) for i in range(3)]
    near(vmap(loss, in_dims=(0, None))(stack_trees(several), X[0]), torch.stack([loss(a, X[0]) for a in several]))
    v = with_noise(tree_map(torch.zeros_like, adapters), seed=9)
    _, hv = jvp(lambda a: grad(loss)(a, X[0]), (adapters,), (v,))
    inputs = tree_map(lambda x: x.clone().requires_grad_(), adapters)
    first = torch.autograd.grad(loss(inputs, X[0]), list(leaves(inputs).values()), create_graph=True)
    dot = sum((g * d).sum() for g, d in zip(first, leaves(v).values(), strict=True))
    near(list(leaves(hv).values()), torch.autograd.grad(dot, list(leaves(inputs).values())))  # pyright: ignore


# -------------------------------------------------------------------------------------------------------- other modules


class Encoder(nn.Module):
    """A token classifier on torch's own transformer: in_proj_weight is a parameter of nn.MultiheadAttention itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(31, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.table(x)).mean(-2))


class Convolutions(nn.Module):
    """A picture of tokens: convolutions and BatchNorm, then a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(1, 6, 3), nn.BatchNorm1d(6), nn.Tanh(), nn.Conv1d(6, 4, 3), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x[:, None].float() / 31))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.cell, self.head = nn.Embedding(31, 6), nn.LSTM(6, 8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.table(x))[0][:, -1])


class Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        config = BertConfig(vocab_size=31, max_position_embeddings=9, num_labels=3, **sizes)
        config._attn_implementation = "eager"
        self.model = BertForSequenceClassification(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(input_ids=x).logits


MODULES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "encoder": (Encoder, r"table|head|encoder\.layers\.\d\.(linear\d|self_attn\.(in_proj_weight|out_proj))"),
    "convolutions": (Convolutions, r"head\.\d"),
    "recurrent": (Recurrent, r"table|head|cell\.weight_.*"),
    "bert": (Bert, r"model\.(classifier|bert\..*\.(query|key|value|dense|word_embeddings))"),
}
LABELS = torch.tensor([0, 2, 1])


@pytest.fixture(scope="module", params=MODULES)
def some(request: pytest.FixtureRequest) -> tuple[nn.Module, str]:
    make, target = MODULES[request.param]
    torch.manual_seed(0)
    return randomized(make()), target


def mean(module: Callable[[Tensor], Tensor]) -> Tensor:
    return F.cross_entropy(module(X), LABELS)


@pytest.fixture
def differentiable() -> Iterator[None]:
    """torch's attention as sums and products: its kernels have no second derivatives, and no forward ones."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


class Low(nn.Module):
    """W + s B A as a parametrisation of torch's: a reference that knows nothing of ours."""

    def __init__(self, x: fgpt.LoRA) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Parameter(x.a.clone()), nn.Parameter(x.b.clone()), x.scale

    def forward(self, w: Tensor) -> Tensor:
        return w + self.scale * self.b @ self.a


def parametrised(module: nn.Module, adapters: fgpt.Adapters) -> tuple[nn.Module, list[nn.Parameter]]:
    """A copy of `module` under the same LoRA, and its trained parameters in the order of `leaves`."""
    module, trained = copy.deepcopy(module), []
    for path, x in adapters.items():
        assert isinstance(x, fgpt.LoRA)
        low, (above, _, name) = Low(x), path.rpartition(".")
        part = module.get_submodule(above)
        inner = part if isinstance(part._parameters.get(name), Tensor) else module.get_submodule(path)
        parametrize.register_parametrization(inner, name if inner is part else "weight", low)
        trained += [low.a, low.b]
    return module, trained


def test_any_module_lifted_is_itself(some: tuple[nn.Module, str]):
    module, target = some
    params, apply = fgpt.from_module(module)
    adapted = fgpt.adapt(params, fgpt.lora(params, fgpt.key(0), 2, target=target))
    with torch.no_grad():  # torch takes other kernels where nothing requires grad
        assert torch.equal(apply(params, X), module(X))
        assert torch.equal(apply(adapted, X), module(X))
    near(apply(params, X), module(X).detach())
    assert set(leaves(params)) == {path_of(module, name) for name, _ in module.named_parameters()}
    grads = grad(lambda a: mean(lambda x: apply(fgpt.adapt(params, a), x)))(fgpt.trainable_leaves(params))
    near(grads, native_grads(module, mean))


@pytest.mark.usefixtures("differentiable")
def test_derivatives_of_any_module_are_plain_autograds(some: tuple[nn.Module, str]):
    """LoRA as a parametrisation of the module: gradient, and double backward against jvp of grad, or grad of it where
    torch's LSTM has no forward derivative.
    """
    module, target = some
    params, apply = fgpt.from_module(module)
    adapters = with_noise(fgpt.lora(params, fgpt.key(0), 2, target=target))
    reference, trained = parametrised(module, adapters)

    def loss(a: Any) -> Tensor:
        return mean(lambda x: apply(fgpt.adapt(params, a), x))

    near(loss(adapters), mean(reference).detach())
    first = torch.autograd.grad(mean(reference), trained, create_graph=True)
    near(list(leaves(grad(loss)(adapters)).values()), [g.detach() for g in first])
    v = with_noise(tree_map(torch.zeros_like, adapters), seed=9)
    dot = sum((g * d).sum() for g, d in zip(first, leaves(v).values(), strict=True))
    expected = torch.autograd.grad(dot, trained, materialize_grads=True)  # pyright: ignore
    if isinstance(module, Recurrent):
        hv = grad(lambda a: sum((g * d).sum() for g, d in zip(leaves(grad(loss)(a)).values(), leaves(v).values())))(
            adapters
        )
    else:
        _, hv = jvp(grad(loss), (adapters,), (v,))
    near(list(leaves(hv).values()), list(expected))


def test_any_module_is_mapped_over_examples_and_over_adapters(some: tuple[nn.Module, str]):
    module, target = some
    params, apply = fgpt.from_module(module)
    adapters = with_noise(
        fgpt.lora(params, fgpt.key(0), 2, target=target) | fgpt.trainable_leaves(params, r".*(?i:norm).*|.*head.*b")
    )

    def loss(a: Any, row: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(apply(fgpt.adapt(params, a), row[None]), label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))(adapters, X, LABELS)
    near(each, stack_trees([grad(loss)(adapters, *pair) for pair in zip(X, LABELS, strict=True)]))
    several = [with_noise(adapters, seed=i) for i in range(3)]
    got = vmap(grad(loss), in_dims=(0, None, None))(stack_trees(several), X[0], LABELS[0])
    near(got, stack_trees([grad(loss)(a, X[0], LABELS[0]) for a in several]))


# ------------------------------------------------------------------------------------------------------ ties and layers


class Tied(nn.Module):
    """A table that is a head with a bias, one module under two names, and one bias in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first = nn.Embedding(31, 8), nn.Linear(8, 8)
        self.again, self.other, self.head = self.first, nn.Linear(8, 8), nn.Linear(8, 31)
        self.other.bias, self.head.weight = self.first.bias, self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.other(torch.tanh(self.again(torch.tanh(self.first(self.table(x)))))))


def test_what_is_tied_stays_one_leaf_at_its_first_name():
    module = randomized(Tied())
    params, apply = fgpt.from_module(module)
    assert list(leaves(params)) == ["table.w", "first.w", "first.b", "other.weight.w", "head.bias"]
    grads = grad(lambda a: apply(fgpt.adapt(params, a), X).square().mean())(fgpt.trainable_leaves(params))
    near(list(grads.values()), list(native_grads(module, lambda m: m(X).square().mean()).values()))
    moved = with_noise(fgpt.lora(params, fgpt.key(0), 2, target="table|first|other.weight"))
    expected = copy.deepcopy(module)
    with torch.no_grad():
        for name in moved:
            x: Any = moved[name]
            weight = expected.get_parameter(f"{name.removesuffix('.weight')}.weight")
            weight += x.scale * x.b @ x.a  # the one Parameter, wherever it stands
    near(apply(fgpt.adapt(params, moved), X), expected(X).detach())
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
        made = Conv1D(out, inp) if kind == "conv1d" else nn.Linear(inp, out, bias=kind != "bare")
        if kind == "deeper":
            return nn.ModuleDict({"x": made})["x"] if inp == out else nn.Sequential(nn.Tanh(), nn.Sequential(made))
        return nn.Sequential(made, nn.LayerNorm(out)) if kind == "norm" else made

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


# ---------------------------------------------------------------------------------------------- dtypes, quantized bases


@pytest.mark.parametrize("method", FRESH)
def test_a_half_precision_module_keeps_its_dtype_and_the_adapters_theirs(method: str):
    module = hf_gpt2().to(torch.bfloat16)
    params, apply = fgpt.from_module(module)
    adapters = FRESH[method](params, MATRICES)
    logits = apply(fgpt.adapt(params, adapters), X).logits
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, module(X).logits)
    assert torch.equal(apply(fgpt.adapt(params, fgpt.trainable_leaves(params)), X).logits, module(X).logits)
    grads = leaves(grad(lifted_loss(params, apply))(with_noise(adapters) | fgpt.trainable_leaves(params, r".*ln_.*")))
    assert {g.dtype for g in grads.values()} == {torch.float32}
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in grads.values())


@pytest.mark.parametrize("to", ["nf4", "fp4", "int8", "blockwise8"])
def test_a_quantized_base_is_the_module_of_its_dequantized_numbers(to: Any):
    module = hf_gpt2(n_embd=64)
    params, apply = fgpt.from_module(module)
    small = fgpt.quantize(params, to, target=MATRICES)
    plain = fgpt.merge(small, base="dequantized")
    other = copy.deepcopy(module)
    for path, w in weight_matrices(plain).items():
        other.get_parameter(f"{path}.weight").data = w.T.clone() if ".c_" in path else w.clone()  # pyright: ignore
    near(apply(small, X).logits, other(X).logits.detach(), 1e-6)
    assert not torch.allclose(apply(small, X).logits, module(X).logits, atol=1e-3)
    adapters = with_noise(
        fgpt.dora(small, fgpt.key(0), 4, target=MATRICES) | fgpt.trainable_leaves(small, r".*ln_.*"), 0.05
    )
    near(grad(lifted_loss(small, apply))(adapters), grad(lifted_loss(plain, apply))(adapters))
    each = vmap(lambda row: grad(lambda a: apply(fgpt.adapt(small, a), row[None]).logits.square().mean())(adapters))(X)
    assert all(len(g) == len(X) and g.isfinite().all() for g in leaves(each).values())


# --------------------------------------------------------------------------------------------- the module is left alone


def test_training_leaves_the_module_alone(tmp_path: Path):
    """Two steps: with B = 0 the first moves no A. The tree that is trained moves, and nothing else."""
    module: Any = hf_gpt2()
    module.transformer.h[0].requires_grad_(False)
    flags, before = [x.requires_grad for x in module.parameters()], snapshot(module)
    tensors = [id(x) for x in module.parameters()]
    params, apply = fgpt.from_module(module)
    adapters, optimizer = fgpt.lora(params, fgpt.key(0), 4, target=MATRICES), fgpt.adamw(1e-2)
    adapters |= fgpt.trainable_leaves(params, r".*ln_.*")

    def loss(adapters: Any, params: Any, batch: fgpt.Batch, rng: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = apply(fgpt.adapt(params, adapters), input_ids=batch.tokens).logits
        nll = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
        return (nll * batch.weights.flatten()).sum(), batch.weights.sum()

    step, state, losses = fgpt.make_step(loss, optimizer), fgpt.init_state(adapters, optimizer), []
    for _ in range(3):
        state, metrics = step(state, params, [fgpt.Batch(X[:, :-1], X[:, 1:], torch.ones(3, 8))], None)
        losses.append(metrics.loss.item())
    assert losses[0] > losses[1] > losses[2]
    assert all(not torch.equal(x, y) for x, y in zip(leaves(adapters).values(), leaves(state.trainable).values()))
    assert same(snapshot(module), before)
    assert [x.requires_grad for x in module.parameters()] == flags
    assert all(x.grad is None for x in module.parameters())
    assert [id(x) for x in module.parameters()] == tensors
    fgpt.save_adapters(state.trainable, tmp_path / "a.safetensors")
    again = fgpt.load_adapters(tmp_path / "a.safetensors", params)
    assert torch.equal(apply(fgpt.adapt(params, again), X).logits, apply(fgpt.adapt(params, state.trainable), X).logits)


def test_the_module_is_itself_again_after_an_error(gpt2: nn.Module):
    params, apply = fgpt.from_module(gpt2)
    before, tensors = snapshot(gpt2), [id(x) for x in gpt2.parameters()]
    with pytest.raises(IndexError):
        apply(with_noise(params), X + 31)
    assert same(snapshot(gpt2), before)
    assert [id(x) for x in gpt2.parameters()] == tensors


def test_a_module_under_two_names_is_itself_again():
    """Where torch's `tie_weights` leaves it with the tensors of the call."""
    module = randomized(Tied())
    before, tensors = snapshot(module), [id(x) for x in module.parameters()]
    params, apply = fgpt.from_module(module)
    grad(lambda p: apply(p, X).sum())(params)
    assert [id(x) for x in module.parameters()] == tensors
    assert same(snapshot(module), before)


def test_batchnorm_in_training_mode_updates_nothing():
    module = randomized(Convolutions()).train()
    before = snapshot(module)
    params, apply = fgpt.from_module(module)
    grads = grad(lambda a: mean(lambda x: apply(fgpt.adapt(params, a), x)))(fgpt.trainable_leaves(params))
    out = apply(params, X)
    assert same(snapshot(module), before)
    near(grads, native_grads(module, mean))
    other = copy.deepcopy(module)
    assert torch.equal(out, other(X))
    assert not same(snapshot(other), before)  # torch's own call does update
    assert torch.equal(apply(params, X), out)
    with pytest.raises(RuntimeError, match="Batch norm got a batched tensor"):  # torch's word: one batch, one statistic
        vmap(lambda x: apply(params, x[None].expand(2, -1)))(X)


def test_a_buffer_is_read_as_it_stands():
    module = randomized(Convolutions())
    params, apply = fgpt.from_module(module)
    module.get_buffer("body.1.running_mean").add_(1.0)
    assert torch.equal(apply(params, X), module(X))
    module.train()
    torch.manual_seed(0)
    assert torch.equal(apply(params, X), copy.deepcopy(module)(X))


def test_dropout_in_training_mode_is_torchs():
    module = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5))
    params, apply = fgpt.from_module(module)
    x = torch.ones(3, 4)
    torch.manual_seed(3)
    expected = module(x)
    torch.manual_seed(3)
    assert torch.equal(apply(params, x), expected)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: apply(params, x))(x)
    masks = [vmap(lambda x: apply(params, x), randomness=how)(x) == 0 for how in ("same", "different")]
    assert torch.equal(masks[0][0], masks[0][1])
    assert not torch.equal(masks[1][0], masks[1][1])


OUTSIDE = """
import torch
from torch import nn
from torch.func import grad

import fgpt

module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
params, apply = fgpt.from_module(module)
adapters, x = fgpt.dora(params, fgpt.key(0), 2, target="0|2"), torch.ones(3, 6)
fn = grad(lambda a: apply(fgpt.adapt(params, a), x).square().mean())
compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")(adapters)
for path, expected in fgpt.tree.leaves(fn(adapters)).items():
    torch.testing.assert_close(fgpt.tree.leaves(compiled)[path], expected)
for thing in (lambda x: x, nn.Linear):
    try:
        fgpt.from_module(thing)
    except fgpt.InputError as err:
        print(err)
"""


def test_gradients_compile_whole_and_what_is_no_module_is_named():
    """In a process of its own: the whole-package check of these tests is what a compiler cannot trace, and what
    refuses an argument of another type first.
    """
    done = subprocess.run([sys.executable, "-c", OUTSIDE], capture_output=True, text=True, check=False)
    named = [f"from_module expects an ordinary nn.Module, got {name}" for name in ("function", "type")]
    assert done.stdout.splitlines() == named, done.stderr[-3000:]


# -------------------------------------------------------------------------------------------------------- recomputation


class Recomputing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def inner(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)  # pyright: ignore


def test_a_module_that_recomputes_is_refused(gpt2: Any):
    """torch.func.functional_call alone gives, without a word, the gradient of another model."""
    params, apply = fgpt.from_module(Recomputing())
    with pytest.raises(fgpt.InputError, match="turn its activation checkpointing off"):
        apply(
            fgpt.adapt(params, {path: x.requires_grad_() for path, x in leaves(fgpt.trainable_leaves(params)).items()}),
            X[:, :4] / 31,
        )
    for reentrant in (False, True):
        module = copy.deepcopy(gpt2).train()
        module.gradient_checkpointing_enable({"use_reentrant": reentrant})
        params, apply = fgpt.from_module(module)
        with pytest.raises(fgpt.InputError, match="turn its activation checkpointing off"):
            apply(params, X)
        module.eval()  # where transformers recomputes nothing
        assert torch.equal(apply(params, X).logits, gpt2(X).logits)


def test_the_whole_call_may_be_recomputed(gpt2: nn.Module):
    params, apply = fgpt.from_module(gpt2)
    tuned = {path: x.requires_grad_() for path, x in with_noise(fgpt.trainable_leaves(params)).items()}

    def loss(tuned: Any) -> Tensor:
        return lifted_loss(params, apply)(tuned)

    got, expected = (
        torch.autograd.grad(value, list(tuned.values()), materialize_grads=True)
        for value in (checkpoint(loss, tuned, use_reentrant=False), loss(tuned))
    )
    near(list(got), list(expected))  # pyright: ignore


# ------------------------------------------------------------------------------------------------------------ bad input


def pair() -> tuple[Any, Any]:
    return fgpt.from_module(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))


def integers() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4))
    module[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.uint8), requires_grad=False)
    return module


def dropped(params: Any) -> Any:
    return fgpt.adapt(params, fgpt.lora(params, fgpt.key(0), 2, target="0", dropout=0.5), rng=fgpt.key(1))


def applied(change: Callable[[Any], Any]) -> Callable[[], Any]:
    def call() -> Any:
        params, apply = pair()
        return apply(change(params), torch.ones(2, 4))

    return call


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fgpt.from_module(torch.jit.script(nn.Linear(2, 2))),
            r"ordinary nn\.Module, got RecursiveScriptModule",
        ),
        (lambda: fgpt.from_module(nn.LazyLinear(4)), "parameter weight has no shape yet: call the module once"),
        (lambda: fgpt.from_module(integers()), r"parameter 0\.weight is torch\.uint8, expected a floating dtype"),
        (
            lambda: fgpt.from_module(nn.Embedding(4, 2, max_norm=1.0)),
            "the module has max_norm, which changes its table",
        ),
        (lambda: fgpt.from_module(nn.Sequential(nn.EmbeddingBag(4, 2, max_norm=1.0))), "0 has max_norm"),
        (lambda: fgpt.lora(pair()[0], fgpt.key(0)), r"selector 'blocks.* matches no path; nearest are 0"),
        (lambda: fgpt.lora(pair()[0], fgpt.key(0), target="1"), "selector '1' matches no path"),
        (lambda: fgpt.lora(pair()[0], fgpt.key(0), rank=5, target="0"), "rank 5 on 0: expected 1 to 4"),
        (lambda: fgpt.trainable_leaves(pair()[0], r"0\.weight"), r"matches no path; nearest are .*0\.w"),
        (lambda: fgpt.adapt(pair()[0], {"0.b": torch.ones(3)}), r"tensor at 0\.b has shape \[3\]"),
        (lambda: fgpt.adapt(pair()[0], {"1": fgpt.IA3(torch.ones(4))}), "no layer '1' to adapt; the base has 0"),
        (applied(lambda p: {"0": p["0"]}), r"no '1\.weight' in these params: expected a tree of this Sequential"),
        (applied(lambda p: p | {"2": p["0"]}), r"'2\.w' is not a parameter of this Sequential"),
        (applied(lambda p: torch.ones(2)), r"no '0\.w' in these params"),
        (
            applied(lambda p: replace_at(p, {"1.bias": torch.ones(3)})),
            r"1\.bias has shape \[3\], but 1\.bias of the module has \[4\]",
        ),
        (
            applied(lambda p: stack_trees([p, p])),
            r"0\.w has shape \[2, 4, 4\], but 0\.weight of the module has \[4, 4\]",
        ),
        (
            applied(lambda p: fgpt.adapt(dropped(p), {"0": fgpt.IA3(torch.ones(4))})),
            r"the adapter on 0\.w has dropout, which cannot be merged: adapt without rng",
        ),
    ],
)
def test_what_does_not_fit_is_named(call: Callable[[], Any], message: str):
    with pytest.raises(fgpt.InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
