"""torch.func works on all of it, and the kernels are their references under every transform."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch
from builders import ROOT, close, stack_trees, tokens, with_noise
from builders.transforms import ADAPTERS, BASE, DIRECTION, PACKED, ROWS, autograd, dot, loss
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, hessian, jvp, vjp, vmap
from torch.utils._pytree import tree_structure, tree_unflatten

import fgpt
from fgpt._typing import check_shapes
from fgpt.kernels import attention as A
from fgpt.kernels import cross_entropy as C
from fgpt.tree import tree_map


def row(tree: Any, i: int) -> Any:
    return tree_map(lambda x: x[i], tree)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Puts the references in place of the kernels when called."""

    def go() -> None:
        monkeypatch.setattr("fgpt.model.forward.attention", A.reference)
        monkeypatch.setattr(sys.modules["fgpt.losses"], "cross_entropy", C.reference)  # fgpt.loss is the function

    return go


# ---------------------------------------------------------------------------------------------------------- transforms


def test_the_packed_batch_has_everything():
    assert PACKED.segments is not None
    assert PACKED.loss_positions is not None
    assert 0 < len(PACKED.loss_positions) < PACKED.tokens.numel()
    assert (PACKED.segments == 0).any()
    assert PACKED.segments.max() == 2


@pytest.mark.parametrize("batch", [PACKED, ROWS], ids=["packed", "rows"])
def test_grad_is_autograd(batch: fgpt.Batch):
    expected, _ = autograd(lambda a: loss(a, batch), ADAPTERS)
    close(grad(loss)(ADAPTERS, batch), expected, 1e-6)


def test_kernels_and_references_give_one_gradient(plain: Callable[[], None]):
    kernels = grad(loss)(ADAPTERS)
    plain()
    close(kernels, autograd(loss, ADAPTERS)[0], 1e-6)


def test_per_example_gradients():
    got = vmap(grad(loss), in_dims=(None, 0))(ADAPTERS, ROWS)
    close(got, stack_trees([grad(loss)(ADAPTERS, row(ROWS, i)) for i in range(3)]), 1e-6)
    of_sum = grad(lambda a: vmap(loss, in_dims=(None, 0))(a, ROWS).sum())(ADAPTERS)
    close(of_sum, tree_map(lambda x: x.sum(0), got), 1e-5)


def test_per_example_gradients_of_packed_rows():
    """Each example a packed row of its own: segments are mapped, `at` is None."""
    batch = fgpt.Batch(PACKED.tokens, PACKED.targets, PACKED.weights, PACKED.segments)
    got = vmap(grad(loss), in_dims=(None, 0))(ADAPTERS, batch)
    close(got, stack_trees([grad(loss)(ADAPTERS, row(batch, i)) for i in range(2)]), 1e-6)


def test_an_ensemble_of_adapters():
    trees = [with_noise(ADAPTERS, seed=i) for i in range(3)]
    close(vmap(loss)(stack_trees(trees)), torch.stack([loss(t) for t in trees]), 1e-6)
    close(vmap(grad(loss))(stack_trees(trees)), stack_trees([grad(loss)(t) for t in trees]), 1e-6)


def test_directional_derivative():
    value, slope = jvp(loss, (ADAPTERS,), (DIRECTION,))
    close(value, loss(ADAPTERS), 1e-6)
    close(slope, dot(grad(loss)(ADAPTERS), DIRECTION), 1e-5)
    h = 1e-3
    ahead, behind = (loss(tree_map(lambda x, d, s=s: x + s * h * d, ADAPTERS, DIRECTION)) for s in (1, -1))
    close(slope, (ahead - behind) / (2 * h), 2e-3)  # fp32 differences


def test_jvp_of_logits_is_vjp():
    def f(a: Any) -> Tensor:
        return fgpt.functional_call(fgpt.apply, (BASE, a), PACKED.tokens)

    out, tangent = jvp(f, (ADAPTERS,), (DIRECTION,))
    u = torch.randn(out.shape, generator=fgpt.key(1)) / out.numel() ** 0.5
    close((u * tangent).sum(), dot(vjp(f, ADAPTERS)[1](u)[0], DIRECTION), 1e-5, 1e-5)


@pytest.mark.parametrize("batch", [PACKED, ROWS], ids=["packed", "rows"])
def test_hessian_vector_products(batch: fgpt.Batch, plain: Callable[[], None]):
    """jvp(grad) and grad(grad · v) are autograd's double backward through the references."""
    forward = jvp(lambda a: grad(loss)(a, batch), (ADAPTERS,), (DIRECTION,))[1]
    reverse = grad(lambda a: dot(grad(loss)(a, batch), DIRECTION))(ADAPTERS)
    plain()
    first, inputs = autograd(lambda a: loss(a, batch), ADAPTERS, create_graph=True)
    second = torch.autograd.grad(dot(first, DIRECTION), inputs)
    expected = tree_unflatten(list(second), tree_structure(ADAPTERS))
    assert max(x.abs().max() for x in second) > 1e-2
    close(forward, expected, 1e-5)
    close(reverse, expected, 1e-5)


def test_hessian_of_a_very_small_adapter():
    lora: Any = with_noise(fgpt.lora(BASE, fgpt.key(0), 1, target=r"blocks\.1\.attn\.v"))
    flat = torch.cat([lora["blocks.1.attn.v"].a.flatten(), lora["blocks.1.attn.v"].b.flatten()])

    def f(x: Tensor) -> Tensor:
        return loss({"blocks.1.attn.v": fgpt.LoRA(x[:16].view(1, 16), x[16:].view(16, 1), 2.0)})

    got = hessian(f)(flat)
    close(got, got.T, 1e-6)
    close(got, torch.stack([jvp(grad(f), (flat,), (e,))[1] for e in torch.eye(32)]), 1e-6)
    close(got, vmap(lambda e: grad(lambda x: grad(f)(x) @ e)(flat))(torch.eye(32)), 1e-6)
    assert got.abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------- shapes and compiling


@check_shapes
def product(x: Float[Tensor, "a b"], y: Float[Tensor, "b c"]) -> Float[Tensor, "a c"]:
    return x @ y if x.shape[0] != 3 else y


def test_shapes_are_checked_at_every_call_under_every_transform():
    good, wrong = (torch.ones(2, 4), torch.ones(4, 5)), (torch.ones(2, 4), torch.ones(5, 4))
    assert product(*good).shape == (2, 5)
    stacked = torch.ones(7, 2, 4), torch.ones(7, 4, 5)
    assert vmap(product)(*stacked).shape == (7, 2, 5)
    for call in (
        lambda: product(*wrong),
        lambda: product(good[0].int(), good[1]),
        lambda: product(torch.ones(3, 4), good[1]),  # what it returns is checked too
        lambda: product(*stacked),
        lambda: vmap(product)(stacked[0], stacked[1].mT),
        lambda: grad(lambda x: product(x, wrong[1]).sum())(good[0]),
        lambda: jvp(lambda x: product(x, wrong[1]), (good[0],), (good[0],)),
    ):
        with pytest.raises(jaxtyping.TypeCheckError):
            call()
    with pytest.raises(jaxtyping.TypeCheckError):
        fgpt.apply(BASE, torch.ones(1, 3))  # pyright: ignore
    with pytest.raises(jaxtyping.TypeCheckError):
        vmap(fgpt.hidden, in_dims=(None, 0, 0))(BASE, tokens(31, 2, 3), tokens(31, 2, 4))


COMPILED = """
import sys, torch
sys.path.insert(0, "tests")
from torch.func import grad, grad_and_value, vmap
import fgpt
from builders import close
from builders.transforms import ADAPTERS, BASE, PACKED, ROWS, loss
def check(fn, *args):
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    close(compiled(*args), fn(*args), 1e-6)
check(grad_and_value(loss), ADAPTERS, PACKED)
check(grad(loss), fgpt.trainable_leaves(BASE), PACKED)
check(loss, ADAPTERS, PACKED)
check(lambda a, b: vmap(grad(loss), in_dims=(None, 0))(a, b), ADAPTERS, ROWS)
print("compiled")
"""


@pytest.mark.slow
def test_gradients_compile_whole():
    """In a process of its own: the whole-package check of these tests is what a compiler cannot trace."""
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "compiled", done.stderr[-3000:]
