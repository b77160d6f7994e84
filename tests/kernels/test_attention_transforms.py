"""Attention under vmap: its reference, and one call of the raw kernel for all examples."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import close, tiny, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import fgpt
from fgpt.kernels import attention as A
from fgpt.kernels.documents import Documents
from fgpt.tree import tree_map

aten = torch.ops.aten
FORWARD, BACKWARD = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)


def random_mask(size: tuple[int, ...], queries: int, keys: int, rng: torch.Generator) -> Tensor:
    """No query sees nothing."""
    mask = torch.rand(*size, 1, queries, keys, generator=rng) < 0.5
    return mask | torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).triu(keys - queries)


def random_documents(size: tuple[int, ...], seq: int, rng: torch.Generator) -> Documents:
    """Of 4 documents a row, some of them empty."""
    inner = torch.randint(seq + 1, (*size, 3), generator=rng).sort(-1).values
    ends = inner.new_zeros(*size, 1), inner.new_full((*size, 1), seq)
    return Documents(torch.cat([ends[0], inner, ends[1]], -1).int())


@st.composite
def cases(draw: Callable[..., Any], batch: tuple[int, ...] = (3,)) -> tuple[tuple[Tensor, ...], Any]:
    """Queries, keys and values whose first axes are `batch`, and what is seen: [a mask], [documents] or []."""
    rng = fgpt.key(draw(st.integers(0, 99)))
    kind = draw(st.sampled_from(["causal", "mask", "documents"]))
    past = 0 if kind == "documents" else draw(st.integers(0, 3))
    group, kv, queries, d_head = (draw(st.integers(1, n)) for n in (3, 2, 6, 9))
    keys, rows = queries + past, draw(st.sampled_from([(), (2,)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    shapes = [(group * kv, queries, d_head), *[(kv, keys, d_head)] * 2]
    q, k, v = (torch.randn(*batch, *rows, *shape, generator=rng, dtype=dtype) for shape in shapes)
    if kind == "causal":
        return (q, k, v), []
    if kind == "mask":
        return (q, k, v), [random_mask((*batch, *rows), queries, keys, rng)]
    return (q, k, v), [random_documents((*batch, *rows), queries, rng)]


def fused(q: Tensor, k: Tensor, v: Tensor, seen: list[Any]) -> Tensor:
    return A.attention(q, k, v, *seen).sin().sum()


def reference(q: Tensor, k: Tensor, v: Tensor, seen: list[Any]) -> Tensor:
    masks = (x.mask(q.shape[-2]) if isinstance(x, Documents) else x for x in seen)
    return A.reference(q, k, v, *masks).sin().sum()


THREE = (0, 1, 2)
TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "vmap": vmap,
    "vmap(grad)": lambda f: vmap(grad(f, THREE)),
    "grad(vmap)": lambda f: lambda q, k, v, m: grad(lambda *x: vmap(f)(*x, m).sum(), THREE)(q, k, v),
    "jvp(vmap(grad))": lambda f: (
        lambda q, k, v, m: jvp(lambda *x: vmap(grad(f, THREE))(*x, m), (q, k, v), (k.sum() * q, v, k))[1]
    ),
    "vmap(jvp(grad))": lambda f: vmap(
        lambda q, k, v, m: jvp(lambda *x: grad(f, THREE)(*x, m), (q, k, v), (k.sum() * q, v, k))[1]
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@settings(deadline=None)
@given(case=cases())
def test_one_axis_of_examples(name: str, case: Any):
    (q, k, v), seen = case
    got, expected = (TRANSFORMS[name](f)(q, k, v, seen) for f in (fused, reference))
    close(got, expected, 2e-5 if q.dtype == torch.float32 else 1e-12, 2e-5)


@settings(deadline=None)
@given(cases((2, 3)))
def test_two_axes_of_examples(case: Any):
    (q, k, v), seen = case
    got, expected = (vmap(vmap(grad(f, THREE)), 1)(q, k, v, seen) for f in (fused, reference))
    close(got, expected, 2e-5 if q.dtype == torch.float32 else 1e-12, 2e-5)


@settings(deadline=None)
@given(case=cases(), unmapped=st.sets(st.sampled_from(range(4)), max_size=2), axis=st.integers(0, 2))
def test_operands_that_are_not_mapped(case: Any, unmapped: set[int], axis: int):
    """And examples along another axis than the first."""
    (q, k, v), seen = case
    operands, in_dims = [*(x.movedim(0, axis) for x in (q, k, v)), seen], [axis, axis, axis, 0]
    for i in unmapped:
        operands[i], in_dims[i] = tree_map(lambda x: x[0], (q, k, v, seen)[i]), None
    got, expected = (vmap(grad(f, THREE), tuple(in_dims))(*operands) for f in (fused, reference))
    close(got, expected, 2e-5 if q.dtype == torch.float32 else 1e-12, 2e-5)


def test_cotangents_alone_are_mapped():
    rng = fgpt.key(0)
    q, k, v = (torch.randn(2, 2, 3, 4, generator=rng, dtype=torch.float64) for _ in THREE)
    documents = random_documents((2,), 3, rng)
    for mask, dense in ((None, None), (documents, documents.mask(3)), (documents.mask(3), documents.mask(3))):
        got = jacrev(lambda *x, m=mask: A.attention(*x, m), THREE)(q, k, v)
        close(got, jacrev(lambda *x, m=dense: A.reference(*x, m), THREE)(q, k, v), 1e-12)


class Calls(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", [(), (2,)])
def test_one_call_for_all_examples(rows: tuple[int, ...], masked: bool):
    rng = fgpt.key(0)
    q, k, v = (torch.randn(5, *rows, 2, 3, 4, generator=rng) for _ in THREE)
    seen = [random_mask((5, *rows), 3, 3, rng)] if masked else []
    with Calls() as calls:
        vmap(grad(fused, THREE))(q, k, v, seen)
    assert (calls.counts[FORWARD], calls.counts[BACKWARD]) == (1, 1)
    with Calls() as calls:
        grad(lambda *x: vmap(fused)(*x, seen).sum(), THREE)(q, k, v)
    assert (calls.counts[FORWARD], calls.counts[BACKWARD]) == (1, 1)


def test_per_example_gradients_of_a_model_loop_over_nothing():
    params, n = tiny(n_layer=2), 5
    adapters = fgpt.lora(params, fgpt.key(0), 2, target=r"blocks\..*\.(q|k|v|o)")
    x = tokens(31, n, 1, 9)
    batch = fgpt.Batch(x, x, torch.ones(n, 1, 9))
    with Calls() as calls:
        vmap(grad(lambda a, b: fgpt.loss(fgpt.adapt(params, a), b)), (None, 0))(adapters, batch)
    assert (calls.counts[FORWARD], calls.counts[BACKWARD]) == (2, 2)  # of two layers
