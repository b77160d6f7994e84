"""A rematerialized function is the function, under every transform."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import ROOT, close, same, stack_trees, with_noise
from builders.transforms import ADAPTERS, BASE, DIRECTION, PACKED, ROWS, autograd, dot, loss_with_remat
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vmap

import fgpt
from fgpt.kernels.remat import remat
from fgpt.tree import leaves, node, static

SEGMENTS = fgpt.Batch(PACKED.tokens, PACKED.targets, PACKED.weights, PACKED.segments)  # packed rows, each an example


ENSEMBLE: Any = stack_trees([with_noise(ADAPTERS, seed=i) for i in range(3)])


Loss = Callable[..., Tensor]


def plain(adapters: Any, batch: fgpt.Batch = PACKED) -> Tensor:
    return fgpt.loss(fgpt.adapt(BASE, adapters), batch)


# ------------------------------------------------------------------------------------------------------ the transforms


EXACT: dict[str, Callable[[Loss], Any]] = {
    "value": lambda f: f(ADAPTERS),
    "autograd": lambda f: autograd(f, ADAPTERS)[0],
    "autograd, every weight": lambda f: autograd(f, fgpt.trainable_leaves(BASE))[0],
    "grad": lambda f: grad_and_value(f)(ADAPTERS),
    "grad, rows": lambda f: grad(f)(ADAPTERS, ROWS),
    "vmap(grad)": lambda f: vmap(grad(f), in_dims=(None, 0))(ADAPTERS, ROWS),
    "vmap(grad), packed": lambda f: vmap(grad(f), in_dims=(None, 0))(ADAPTERS, SEGMENTS),
    "vmap(grad), ensemble": lambda f: vmap(grad(f))(ENSEMBLE),
    "vmap(vmap(grad))": lambda f: vmap(vmap(grad(f), in_dims=(None, 0)), in_dims=(0, None))(ENSEMBLE, ROWS),
    "grad(vmap)": lambda f: grad(lambda a: vmap(f, in_dims=(None, 0))(a, SEGMENTS).sum())(ADAPTERS),
    "autograd(vmap)": lambda f: autograd(lambda a: vmap(f, in_dims=(None, 0))(a, ROWS).sum(), ADAPTERS)[0],
    "vmap(grad(vmap))": lambda f: vmap(grad(lambda a: vmap(f, in_dims=(None, 0))(a, ROWS).sum()))(ENSEMBLE),
    "jvp": lambda f: jvp(f, (ADAPTERS,), (DIRECTION,)),
    "jvp(grad)": lambda f: jvp(grad(f), (ADAPTERS,), (DIRECTION,)),
    "grad(grad)": lambda f: grad(lambda a: dot(grad(f)(a), DIRECTION))(ADAPTERS),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", EXACT)
def test_it_is_the_function_bit_for_bit(name: str):
    got, expected = EXACT[name](loss_with_remat), EXACT[name](plain)
    assert same({"": got}, {"": expected})
    assert max(x.abs().max() for x in leaves({"": got}).values()) > 1e-2


def test_a_second_plain_backward():
    """Recorded, the first backward keeps what it records, and the second is that of the function itself."""
    grads, inputs = autograd(loss_with_remat, ADAPTERS, create_graph=True)
    got = torch.autograd.grad(dot(grads, DIRECTION), inputs)
    expected = leaves(jvp(grad(plain), (ADAPTERS,), (DIRECTION,))[1]).values()
    for x, y in zip(got, expected, strict=True):
        assert (x - y).norm() < 1e-5 * y.norm()


COMPILED = """
import sys, torch
sys.path.insert(0, "tests")
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.func import grad, grad_and_value, vmap
from fgpt.kernels.remat import remat
from builders import close
from builders.transforms import ADAPTERS, PACKED, loss_with_remat
def check(fn, *args):
    products = []
    def count(graph, _):
        products.append(sum(node.target is torch.ops.aten.mm.default for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)
    compiled = torch.compile(fn, fullgraph=True, backend=aot_autograd(fw_compiler=count))
    close(compiled(*args), fn(*args), 1e-6)
    return products
f = lambda x: (x @ x).sin()
assert check(lambda x: grad_and_value(lambda x: f(x).sum())(x), torch.ones(3, 3)) == [3]
assert check(lambda x: grad_and_value(lambda x: remat(f)(x).sum())(x), torch.ones(3, 3)) == [4]
assert check(lambda x: remat(f)(x), torch.ones(3, 3)) == [1]
check(lambda x: vmap(grad(lambda x: remat(f)(x).sum()))(x), torch.ones(2, 3, 3))
v = {path: x for path, x in ADAPTERS.items() if path.endswith("attn.v")}
check(grad_and_value(loss_with_remat), v, PACKED)
print("compiled")
"""


@pytest.mark.slow
def test_it_compiles_whole():
    """In a process of its own: the whole-package check of these tests is what a compiler cannot trace."""
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "compiled", done.stderr[-3000:]


# ------------------------------------------------------------------------------------------------------- any function


@node
class Layer:
    w: Tensor
    b: Tensor | None = None
    power: int = static(default=1)


def mlp(x: Tensor, net: dict[str, Any], keep: Tensor | None, scale: float) -> tuple[Tensor, dict[str, Any]]:
    """Layers of a tree; beside them an int tensor or None and a number, going in and coming out, an argument handed
    through, and a tensor of no argument.
    """
    outputs, given_x = [], x
    for layer in net["layers"]:
        x = x @ layer.w.T if layer.b is None else x @ layer.w.T + layer.b
        x = torch.tanh(x) ** layer.power * scale
        outputs.append(x)
    x = x if keep is None else x * keep[..., None]
    return x, {"outputs": outputs, "keep": keep, "scale": scale, "x": given_x, "one": torch.ones(())}


@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=4),
    st.integers(1, 4),
    st.tuples(st.booleans(), st.booleans()),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(0, 99),
)
def test_any_function_of_trees(
    widths: list[int], n: int, has: tuple[bool, bool], power: int, frozen: int, random_seed: int
):
    rng = torch.Generator().manual_seed(random_seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=rng)

    sizes = list(zip(widths[1:], widths[:-1], strict=True))
    layers = {str(i): Layer(normal(*size), normal(size[0]) if has[0] else None, power) for i, size in enumerate(sizes)}
    keep = torch.randint(2, (n,), generator=rng) if has[1] else None
    rows, u, v = normal(3, n, widths[0]), normal(n, widths[-1]), normal(n, widths[1])
    trained = {i: layer for i, layer in layers.items() if i != str(frozen)}

    def gradients(f: Callable[..., Any]) -> dict[str, Any]:
        def loss(tree: tuple[Any, Tensor]) -> Tensor:
            trained_layers, x = tree
            y, aside = f(x, {"layers": [trained_layers.get(i, layer) for i, layer in layers.items()]}, keep, scale=0.5)
            assert (aside["keep"] is None) == (keep is None)
            assert aside["scale"] == 0.5
            return (u * y).sum() + (v * aside["outputs"][0]).sum() * aside["one"] + aside["x"].sum()

        def total(tree: tuple[Any, Tensor]) -> Tensor:
            return vmap(lambda x: loss((tree[0], x)))(tree[1]).sum()

        one, all_rows = (trained, rows[0]), (trained, rows)
        return {
            "value": loss(one),
            "autograd": autograd(loss, one)[0],
            "grad": grad(loss)(one),
            "vmap(grad)": vmap(grad(loss), in_dims=((None, 0),))(all_rows),
            "grad(vmap)": grad(total)(all_rows),
            "jvp(grad)": jvp(grad(loss), (one,), (one,)),
            "grad(grad)": grad(lambda t: dot(grad(loss)(t), one))(one),
        }

    assert same(gradients(remat(mlp)), gradients(mlp))


# ------------------------------------------------------------------------------------------------------------- the cost


class Frozen(torch.autograd.Function):
    """x · w, whose backward fails where it is asked for the gradient of w."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x * w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert not ctx.needs_input_grad[1]
        return grad[0] * ctx.saved_tensors[0], None


def test_a_frozen_weight_gets_no_gradient():
    x, w = torch.randn(3, 4), torch.randn(4)

    def loss(x: Tensor) -> Tensor:
        return remat(Frozen.apply)(x, w).sum()  # pyright: ignore

    for got in (autograd(loss, x)[0], grad(loss)(x), vmap(grad(loss))(x)):
        close(got, w.expand(3, 4), 0.0)


def test_what_depends_on_no_argument_has_no_gradient():
    x = torch.ones(3)
    assert not autograd(lambda x: remat(lambda _: torch.ones(3))(x).sum(), x)[0].any()
    assert not grad(lambda x: remat(lambda _: torch.ones(3))(x).sum())(x).any()


def test_it_runs_once_forward_and_once_backward():
    calls = []

    def f(x: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return x.sin()

    x = torch.ones(3, requires_grad=True)
    y = remat(f)(x).sum()
    assert calls == [False]
    y.backward()
    assert calls == [False, True]
    close(x.grad, x.detach().cos(), 0.0)
    remat(f)(torch.ones(3))
    assert len(calls) == 3
