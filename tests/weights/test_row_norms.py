"""DoRA's row norms: their value, and the gradient that takes them as constants."""

from typing import Any

import pytest
import torch
from builders import with_noise
from builders.adapters import assert_near, dense_by_definition, random_matrix, random_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jvp

import fgpt
from fgpt.kernels import row_norms as base_rows
from fgpt.model import Linear
from fgpt.tree import leaves, tree_map
from fgpt.weights import row_norms

# ------------------------------------------------------------------------------------------------------------ the laws


OUT, IN = 7, 64


# ---------------------------------------------------------------------------------------------------------------- DoRA


EVERY = ("fp32", "bf16", "nf4", "int8", "blockwise8", "rotated int8")


@settings(max_examples=60)
@given(st.one_of(random_weights(*EVERY, columns=False), random_weights(*EVERY)), st.integers(1, 8), st.integers(0, 9))
def test_row_norms_are_the_norms_of_the_rows(w: Any, rows: int, seed: int):
    """Of a bare matrix and of what lies over it, expanded a few rows at a time."""
    a, b = (torch.randn(*size, generator=fgpt.key(seed)) for size in ((3, IN), (OUT, 3)))
    bottom, columns = w, False
    while isinstance(bottom, fgpt.Adapted):
        bottom, columns = bottom.base, columns or bottom.col is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fgpt.kernels.row_norms.CHUNK", rows * IN)
        for weight in (bottom, w):
            exact = dense_by_definition(weight) + 0.7 * b.double() @ a.double()
            got = row_norms(weight, a, b, 0.7)
            assert got.dtype == torch.float32
            rounds = weight is w and columns and bottom.dtype == torch.bfloat16  # W' is formed there, in its dtype
            assert_near(got, exact.norm(dim=-1), 1e-2 if rounds else 1e-5)


def test_a_direction_that_cancels_keeps_a_norm():
    """Rounding may leave ‖w‖² + 2s b·(A w) + s² b A Aᵀ b below zero; and a row of zeros begins as one."""
    w = torch.randn(8, 5, generator=fgpt.key(0))
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    norms = row_norms(w, v, -(u * s), 1.0)
    assert (norms > 0).all()
    assert (norms < 1e-2 * w.norm(dim=-1)).all()
    params = {"layer": Linear(torch.cat([w, torch.zeros(2, 5)]))}
    adapters = fgpt.dora(params, fgpt.key(0), 2, target="layer")
    x = torch.randn(3, 5, generator=fgpt.key(1))

    def f(adapters: Any) -> Tensor:
        return fgpt.linear(x, fgpt.adapt(params, adapters)["layer"].w).square().sum()

    assert torch.equal(fgpt.linear(x, fgpt.adapt(params, adapters)["layer"].w), fgpt.linear(x, params["layer"].w))
    assert all(torch.isfinite(g).all() for g in leaves(grad(f)(adapters)).values())


@pytest.mark.parametrize("kind", ["fp32", "nf4", "blockwise8"])
def test_doras_gradient_takes_the_norm_as_a_constant(kind: str):
    """The paper's form by hand, in float64: y = x (m / c ⊙ V)ᵀ, c = ‖V‖ held. Not that of the whole quotient."""
    bias = torch.randn(OUT, generator=fgpt.key(3))
    base = {"layer": Linear(random_matrix(kind, OUT, IN), bias)}
    adapters: Any = with_noise(fgpt.dora(base, fgpt.key(0), 3, 5, target="layer"))
    x, u = torch.randn(4, IN, generator=fgpt.key(1)), torch.randn(4, OUT, generator=fgpt.key(2))

    def ours(adapters: Any) -> Tensor:
        layer = fgpt.adapt(base, adapters)["layer"]
        return (u * fgpt.linear(x, layer.w, layer.b).sin()).sum()

    def by_hand(a: Tensor, b: Tensor, m: Tensor, norm: Tensor | None = None) -> Tensor:
        v = dense_by_definition(base["layer"].w) + 5 / 3 * b @ a
        norm = v.norm(dim=-1) if norm is None else norm
        y = x.double() @ ((m / norm)[:, None] * v).T + bias.double()
        return (u.double() * y.sin()).sum()

    at: Any = tuple(t.double() for t in leaves(adapters).values())
    norm = (dense_by_definition(base["layer"].w) + 5 / 3 * at[1] @ at[0]).norm(dim=-1)
    assert_near(ours(adapters), by_hand(*at))

    def with_constant_norm(a: Tensor, b: Tensor, m: Tensor) -> Tensor:
        return by_hand(a, b, m, norm)

    got, expected = list(leaves(grad(ours)(adapters)).values()), grad(with_constant_norm, argnums=(0, 1, 2))(*at)
    for g, e in zip(got, expected, strict=True):
        assert_near(g, e)
    whole = grad(by_hand, argnums=1)(*at)
    assert (whole - expected[1]).abs().max() > 0.01 * expected[1].abs().max()
    # Forward mode holds it as well: the slope along a direction, and a Hessian's product, are those of that form.
    along, ones = tree_map(torch.ones_like, adapters), tuple(torch.ones_like(t) for t in at)
    assert_near(jvp(ours, (adapters,), (along,))[1], jvp(with_constant_norm, at, ones)[1])
    second = leaves(jvp(grad(ours), (adapters,), (along,))[1]).values()
    for g, e in zip(second, jvp(grad(with_constant_norm, argnums=(0, 1, 2)), at, ones)[1], strict=True):
        assert_near(g, e)


def test_off_the_cpu_a_matrix_is_one_chunk(monkeypatch: pytest.MonkeyPatch):
    """There each chunk costs launches; on a CPU it is one of 256 rows."""
    shapes: list[tuple[int, ...]] = []
    reference = base_rows.reference

    def record(w: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        shapes.append(tuple(w.shape))
        return reference(w, a)

    monkeypatch.setattr(base_rows, "reference", record)
    for device, chunks in (("meta", [(512, 1024)]), ("cpu", [(256, 1024)] * 2)):
        shapes.clear()
        w, a = torch.ones(512, 1024, dtype=torch.bfloat16, device=device), torch.ones(8, 1024, device=device)
        base_rows.row_sq_and_cross(w, a)
        assert shapes == chunks
