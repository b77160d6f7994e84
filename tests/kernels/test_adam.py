"""The lists of leaves of `fgpt.kernels.adam` and `leaf_lists`: their definitions, to the bit, and few kernels."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from builders import close, same
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import fgpt
from fgpt.kernels import adam, leaf_lists
from fgpt.kernels.adam import AdamNumbers, adam_update
from fgpt.optim import adamw, cosine_schedule, global_norm
from fgpt.train_step import value_and_grad_once
from fgpt.tree import tree_leaves, tree_map

SHAPES = [(3, 5), (17,), (8, 64), (1,), (64, 33), ()]


def random_leaves(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of sizes from 1e-6 to 1, some of them transposed in memory."""
    rng, result = fgpt.key(seed), []
    for i, size in enumerate(SHAPES):
        x = 10.0 ** -(i % 7) * torch.randn(size, generator=rng)
        result.append((x.T.contiguous().T if (i + seed) % 4 == 0 and x.ndim == 2 else x).to(dtype))
    return result


def numbers(dtype: torch.dtype = torch.float32, **changes: Any) -> AdamNumbers:
    eta, bias1, bias2 = torch.tensor([0.01, 0.19, 0.002], dtype=torch.promote_types(dtype, torch.float32))
    return AdamNumbers(eta, bias1, bias2, 0.9, 0.999, 1e-8, 0.0, 0.0)._replace(**changes)


def in_order_of(theta: Tensor, x: Tensor) -> Tensor:
    """At least in fp32, and in the memory order of theta: torch fuses a·b + c or not by the order of its operands."""
    return torch.empty_like(theta, dtype=torch.promote_types(x.dtype, torch.float32)).copy_(x)


def by_definition(thetas: Sequence[Tensor], gs: Any, ms: Any, vs: Any, n: AdamNumbers) -> Any:
    """In fp64 and in the formula's words."""
    eta, bias1, bias2, beta1, beta2, eps, eps_root, decay = n
    results = []
    for theta, g, m, v in zip(*([x.double() for x in xs] for xs in (thetas, gs, ms, vs)), strict=True):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        theta = theta - eta * (m / bias1 / ((v / bias2 + eps_root).sqrt() + eps) + decay * theta)
        results.append((theta, m, v))
    return tuple([list(xs) for xs in zip(*results, strict=True)])


@pytest.mark.parametrize("changes", [{}, {"weight_decay": 0.1}, {"eps_root": 1e-6, "eta": 0.02}, {"beta1": 0.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_lists_are_the_reference_to_the_bit_and_the_formula(dtype: torch.dtype, changes: dict[str, Any]):
    n, lists = numbers(dtype, **changes), [random_leaves(i, dtype) for i in range(3)]
    lists.append([x.square() for x in random_leaves(3, dtype)])
    before = tree_map(torch.clone, lists)
    got = adam_update(*lists, numbers=n)
    wide = [[in_order_of(theta, x) for theta, x in zip(lists[0], xs, strict=True)] for xs in lists]
    expected: Any = [list(xs) for xs in zip(*(adam.reference(*xs, n) for xs in zip(*wide, strict=True)), strict=True)]
    assert same(got, [[x.to(dtype) for x in expected[0]], *expected[1:]])
    assert same(lists, before)
    exact = by_definition(*lists, n)
    if dtype != torch.bfloat16:
        close([[x.double() for x in xs] for xs in got], exact, 1e-7, 2e-7)
    else:
        close([x.double() for x in got[0]], exact[0], 1e-7, 2**-8)
    assert [x.stride() for x in got[0]] == [x.stride() for x in lists[0]]


def test_numbers_that_are_tensors_are_the_same_numbers():
    lists = [random_leaves(0), random_leaves(1), random_leaves(2), [x.square() for x in random_leaves(3)]]
    n = numbers(weight_decay=0.1, eps_root=1e-6)
    as_tensors = AdamNumbers(*(torch.as_tensor(x, dtype=torch.float64) for x in n))
    close(adam_update(*lists, numbers=as_tensors), adam_update(*lists, numbers=n), 1e-7)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "autograd"])
def test_transforms_are_of_the_reference(transform: str):
    lists = [random_leaves(0), random_leaves(1), random_leaves(2), [x.square() + 1e-3 for x in random_leaves(3)]]
    n = numbers(weight_decay=0.1, eps_root=1e-4)

    def total(scale: Tensor, update: Any) -> Tensor:
        return sum(
            (x.sin().sum() for x in tree_leaves(update([(x * scale).float() for x in lists[0]], *lists[1:]))), scale * 0
        )

    def by_lists(scale: Tensor) -> Tensor:
        return total(scale, lambda *xs: adam_update(*xs, numbers=n))

    def by_leaf(scale: Tensor) -> Tensor:
        return total(scale, lambda *xs: [adam.reference(*ys, n) for ys in zip(*xs, strict=True)])

    one, many = torch.tensor(1.5, dtype=torch.float64), torch.tensor([0.5, 1.0, 1.5])
    apply: Any = {
        "vmap": lambda f: vmap(f)(many),
        "grad": lambda f: grad(f)(one),
        "jvp": lambda f: jvp(f, (one,), (one,))[1],
        "autograd": lambda f: torch.autograd.functional.jacobian(f, one),
    }[transform]
    close(apply(by_lists), apply(by_leaf), 1e-6, 1e-6)


def test_sums_quotients_and_norms():
    xs, ys, by = [*random_leaves(0), *random_leaves(4, torch.float64)], random_leaves(1) * 2, torch.tensor(3.7)
    assert same(leaf_lists.add(xs, ys), [x + y for x, y in zip(xs, ys, strict=True)])
    assert same(leaf_lists.divide(xs, by), [x / by for x in xs])
    assert same(leaf_lists.divide(xs, by.double()), [x / by for x in xs])
    exact = sum(float(x.double().square().sum()) for x in xs)
    assert float(leaf_lists.square_norm(xs)) == pytest.approx(exact, rel=1e-6)
    many = torch.tensor([1.0, 2.0])
    close(vmap(lambda s: leaf_lists.square_norm([x * s for x in xs]))(many), exact * many.double().square(), 0.0, 1e-6)
    got = vmap(lambda s: tuple(leaf_lists.divide(leaf_lists.add(xs, ys), s)))(many)
    assert [x.shape[0] for x in got] == [2] * len(xs)


def test_a_norm_of_many_elements_is_exact():
    """torch.linalg.vector_norm is off by 1e-5 here."""
    x = torch.rand(1 << 20, generator=fgpt.key(0))
    assert float(global_norm({"w": x})) == pytest.approx(float(x.double().square().sum().sqrt()), rel=2e-7)


def test_groups_are_of_one_kind_and_bounded():
    xs = [torch.empty(n, device="meta") for n in (3 << 20, 10, 2 << 20, 3 << 20, 9 << 20, 20)]
    found = list(leaf_lists.groups(xs, ["a", "b", "a", "a", "a", "b"]))
    assert sorted(found) == [[0], [1, 5], [2], [3], [4]]
    assert list(leaf_lists.groups(xs[1:2] * 3, ["a"] * 3)) == [[0, 1, 2]]


# ----------------------------------------------------------------------------------------------------------- a step's


class Dispatches(TorchDispatchMode):
    """The operators that compute something: views are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_has_few_kernels_besides_its_gradient(micro_batches: int):
    """The norm, the division, clipping and AdamW of a LoRA on 96 layers: not some for each of its 192 leaves."""
    trained = {f"blocks.{i}.q": fgpt.LoRA(torch.ones(2, 4), torch.ones(4, 2), 4.0) for i in range(96)}
    optimizer = adamw(cosine_schedule(1e-3, 10, warmup_steps=2), weight_decay=0.1)
    step, state = fgpt.make_step(total, optimizer), fgpt.init_state(trained, optimizer)
    with Dispatches() as gradient:
        value_and_grad_once(total, trained)
    with Dispatches() as whole:
        step(state, None, [BATCH] * micro_batches, None)
    assert 30 < whole.count - micro_batches * gradient.count <= 60


BATCH = fgpt.Batch(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))


def total(trained: Any, *_: Any) -> tuple[Tensor, Tensor]:
    x = torch.cat([x.reshape(-1) for x in tree_leaves(trained)])
    return x.square().sum(), x.new_ones(())
