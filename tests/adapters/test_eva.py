"""EVA: A is the principal directions of what a layer reads, and ranks go where they explain most."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from builders import same, tiny
from builders.initialized import BATCH, FAMILIES, TOKENS, base
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad

import fgpt
from fgpt.adapter_initialization import _share_ranks
from fgpt.layer_inputs import input_point, input_rows
from fgpt.tree import astype, leaves


def inputs(params: fgpt.GPT, path: str) -> np.ndarray:
    """What the layer at a path reads, [positions in]."""
    point = input_point(params, path)
    (x,) = fgpt.trace(params, BATCH.tokens, target=re.escape(point))[1].values()
    return input_rows(point, x).flatten(0, -2).double().numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_is_the_right_singular_vectors_of_the_inputs(family: str) -> None:
    before = astype(base(family), torch.float64)
    adapters: Any
    params, adapters = fgpt.eva(before, [BATCH], rank=3, rho=1)
    assert same(params, before)
    assert adapters.keys() == fgpt.lora(before, fgpt.key(0), rank=3).keys()
    assert torch.equal(fgpt.functional_call(fgpt.apply, (params, adapters), TOKENS), fgpt.apply(before, TOKENS))
    for path, x in adapters.items():
        vh = np.linalg.svd(inputs(before, path))[2]
        np.testing.assert_allclose(np.abs(vh[:3] @ x.a.numpy().T), np.eye(3), atol=1e-6)
        assert x.b.abs().max() == 0


@pytest.mark.parametrize("rs", [False, True])
def test_ranks_follow_the_shares_of_variance(rs: bool) -> None:
    params, rank, rho = tiny(), 3, 1.6
    adapters: Any
    _, adapters = fgpt.eva(params, [BATCH], rank, 5.0, rs=rs, rho=rho)
    candidates: list[tuple[float, str]] = []
    for path in fgpt.lora(params, fgpt.key(0), rank=1):
        squares = np.linalg.svd(inputs(params, path))[1] ** 2
        candidates += [(x, path) for x in squares[:5] / squares.sum()]  # round(4.8) is 5
    taken = [path for _, path in sorted(candidates, key=lambda x: -x[0])[: 12 * rank]]
    assert {path: len(x.a) for path, x in adapters.items()} == {path: taken.count(path) for path in set(taken)}
    assert len({len(x.a) for x in adapters.values()}) > 2
    for x in adapters.values():
        assert x.scale == pytest.approx(5 / 3**0.5 if rs else 5 / 3)


@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=5), min_size=1, max_size=4), st.integers(1, 3))
def test_no_direction_left_out_has_a_larger_share_than_one_taken(rows: list[list[int]], rank: int) -> None:
    shares = {str(i): torch.tensor(sorted(row, reverse=True)) / 9 for i, row in enumerate(rows)}
    ranks = _share_ranks(shares, rank * len(rows))
    assert sum(ranks.values()) == rank * len(rows)
    taken = [float(x) for path, r in ranks.items() for x in shares[path][:r]]
    left = [float(x) for path in shares for x in shares[path][ranks.get(path, 0) :]]
    assert min(taken) >= max(left, default=0)
    assert 0 not in ranks.values()


def test_over_a_quantized_base_and_trained() -> None:
    params = fgpt.quantize(tiny(d_model=64, d_mlp=128), "nf4")
    adapters: Any
    same_params, adapters = fgpt.eva(params, [BATCH, BATCH], rank=2, target=r".*\.(q|v|down)", svd_iterations=8)
    assert same_params is params
    slopes: Any = grad(lambda a: fgpt.loss(fgpt.adapt(params, a), BATCH))(adapters)
    assert all(x.abs().max() > 0 for path, x in leaves(slopes).items() if path.endswith("/b"))
    exact: Any = fgpt.eva(params, [BATCH], rank=2, target=r".*\.(q|v|down)")[1]
    assert {path: len(x.a) for path, x in exact.items()} == {path: len(x.a) for path, x in adapters.items()}
    for path, x in adapters.items():
        np.testing.assert_allclose((x.a @ exact[path].a.T).abs(), torch.eye(len(x.a)), atol=1e-3)


def test_no_bound_of_a_rank_is_an_infinite_rho() -> None:
    unbounded = fgpt.eva(tiny(), [BATCH], rank=2, target=r".*\.up", rho=float("inf"))[1]
    bounded = fgpt.eva(tiny(), [BATCH], rank=2, target=r".*\.up", rho=8.0)[1]  # the layers have 16 inputs
    assert same(unbounded, bounded)


def test_errors() -> None:
    params = tiny()
    with pytest.raises(fgpt.InputError, match=r"rho is 0.5: expected 1 or more"):
        fgpt.eva(params, [BATCH], rank=2, rho=0.5)
    short = fgpt.Batch(TOKENS[:1, :3], TOKENS[:1, :3], torch.ones(1, 3))
    with pytest.raises(fgpt.InputError, match="3 positions of text have no 4 directions: give more batches"):
        fgpt.eva(params, [short], rank=2)
    with pytest.raises(fgpt.InputError, match="at least one batch with text"):
        fgpt.eva(params, [], rank=2)
    with pytest.raises(fgpt.InputError, match=r"rank 17 on blocks.0.attn.q"):
        fgpt.eva(params, [BATCH], rank=17)
    with pytest.raises(fgpt.InputError, match="wte: expected a layer of the blocks"):
        fgpt.eva(params, [BATCH], rank=2, target="wte")
