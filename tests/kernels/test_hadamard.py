"""The rotation is Hadamard's matrix by blocks, and undoes itself."""

import pytest
import torch
from builders import close
from builders.quantized import signs
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

import fgpt
from fgpt.kernels.hadamard import hadamard_block, reference, rotate


@pytest.mark.parametrize("block", [8, 16, 64])
def test_each_block_is_multiplied_by_hadamards_matrix(block: int):
    x = torch.randn(3, 2, 4 * block, generator=fgpt.key(0))
    h = signs(block) / block**0.5
    expected = torch.stack([part @ h for part in x.split(block, -1)], -2).flatten(-2)
    close(rotate(x, block), expected, 1e-5)
    close(reference(x, block), expected, 1e-5)


@given(st.integers(1, 5), st.sampled_from([8, 16, 32, 64]), st.integers(0, 99))
def test_it_keeps_norms_and_undoes_itself(blocks: int, block: int, seed: int):
    x = torch.randn(3, blocks * block, generator=fgpt.key(seed), dtype=torch.float64)
    close(rotate(x, block).norm(dim=-1), x.norm(dim=-1), 1e-12)
    close(rotate(rotate(x, block), block), x, 1e-12)


def test_an_outlier_is_spread_over_its_block():
    x = torch.zeros(128)
    x[70] = 80.0
    close(rotate(x, 64).abs(), torch.cat([torch.zeros(64), torch.full((64,), 10.0)]), 1e-5)


def test_under_transforms_and_in_inference_mode():
    x, t = torch.randn(2, 16, generator=fgpt.key(0)), torch.randn(2, 16, generator=fgpt.key(1))
    with torch.inference_mode():
        first = rotate(x, 16)
    leaf = x.clone().requires_grad_()
    rotate(leaf, 16).backward(t)  # a matrix made in inference mode could not be saved for a backward
    close(first, rotate(x, 16), 0)
    close(leaf.grad, rotate(t, 16), 1e-6)
    close(grad(lambda x: (rotate(x, 16) * t).sum())(x), rotate(t, 16), 1e-6)
    close(jvp(lambda x: rotate(x, 16), (x,), (t,))[1], rotate(t, 16), 1e-6)
    close(vmap(lambda x: rotate(x, 16))(x), rotate(x, 16), 1e-6)


@pytest.mark.parametrize(
    ("width", "block"), [(4096, 64), (768, 64), (576, 64), (96, 32), (80, 16), (72, 8), (100, None), (7, None)]
)
def test_the_block_is_the_largest_power_of_two_that_divides_a_row(width: int, block: int | None):
    assert hadamard_block(width) == block
