"""Any module, lifted: itself, its derivatives, mapped over."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import stack_trees, with_noise
from builders.lifted_modules import (
    LABELS,
    Convolutions,
    X,
    assert_near,
    mean_loss,
    native_grads,
    path_of,
    with_random_params,
)
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from transformers import BertConfig, BertForSequenceClassification

import fgpt
from fgpt.tree import leaves, tree_map


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


@pytest.fixture(scope="module", params=MODULES)
def lifted_module(request: pytest.FixtureRequest) -> tuple[nn.Module, str]:
    make, target = MODULES[request.param]
    torch.manual_seed(0)
    return with_random_params(make()), target


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


def with_parametrized_weights(module: nn.Module, adapters: fgpt.Adapters) -> tuple[nn.Module, list[nn.Parameter]]:
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


def test_any_module_lifted_is_itself(lifted_module: tuple[nn.Module, str]):
    module, target = lifted_module
    params, apply = fgpt.from_module(module)
    adapted = fgpt.adapt(params, fgpt.lora(params, fgpt.key(0), 2, target=target))
    with torch.no_grad():  # torch takes other kernels where nothing requires grad
        assert torch.equal(apply(params, X), module(X))
        assert torch.equal(apply(adapted, X), module(X))
    assert_near(apply(params, X), module(X).detach())
    assert set(leaves(params)) == {path_of(module, name) for name, _ in module.named_parameters()}
    grads = grad(lambda a: mean_loss(lambda x: apply(fgpt.adapt(params, a), x)))(fgpt.trainable_leaves(params))
    assert_near(grads, native_grads(module, mean_loss))


@pytest.mark.usefixtures("differentiable")
def test_derivatives_of_any_module_are_plain_autograds(lifted_module: tuple[nn.Module, str]):
    """LoRA as a parametrisation of the module: gradient, and double backward against jvp of grad, or grad of it where
    torch's LSTM has no forward derivative.
    """
    module, target = lifted_module
    params, apply = fgpt.from_module(module)
    adapters = with_noise(fgpt.lora(params, fgpt.key(0), 2, target=target))
    reference, trained = with_parametrized_weights(module, adapters)

    def loss(a: Any) -> Tensor:
        return mean_loss(lambda x: apply(fgpt.adapt(params, a), x))

    assert_near(loss(adapters), mean_loss(reference).detach())
    first = torch.autograd.grad(mean_loss(reference), trained, create_graph=True)
    assert_near(list(leaves(grad(loss)(adapters)).values()), [g.detach() for g in first])
    v = with_noise(tree_map(torch.zeros_like, adapters), seed=9)
    dot = sum((g * d).sum() for g, d in zip(first, leaves(v).values(), strict=True))
    expected = torch.autograd.grad(dot, trained, materialize_grads=True)  # pyright: ignore
    if isinstance(module, Recurrent):
        hv = grad(lambda a: sum((g * d).sum() for g, d in zip(leaves(grad(loss)(a)).values(), leaves(v).values())))(
            adapters
        )
    else:
        _, hv = jvp(grad(loss), (adapters,), (v,))
    assert_near(list(leaves(hv).values()), list(expected))


def test_any_module_is_mapped_over_examples_and_over_adapters(lifted_module: tuple[nn.Module, str]):
    module, target = lifted_module
    params, apply = fgpt.from_module(module)
    adapters = with_noise(
        fgpt.lora(params, fgpt.key(0), 2, target=target) | fgpt.trainable_leaves(params, r".*(?i:norm).*|.*head.*b")
    )

    def loss(a: Any, row: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(apply(fgpt.adapt(params, a), row[None]), label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))(adapters, X, LABELS)
    assert_near(each, stack_trees([grad(loss)(adapters, *pair) for pair in zip(X, LABELS, strict=True)]))
    several = [with_noise(adapters, seed=i) for i in range(3)]
    got = vmap(grad(loss), in_dims=(0, None, None))(stack_trees(several), X[0], LABELS[0])
    assert_near(got, stack_trees([grad(loss)(a, X[0], LABELS[0]) for a in several]))
