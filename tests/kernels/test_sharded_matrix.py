"""Parts of a matrix are what the whole was, of every format, and each is no more than its share."""

from typing import Any

import pytest
import torch
from builders import same
from builders.quantized import FORMATS, normal_matrix
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

import fgpt
from fgpt.kernels import quantized_linear, sharded_matrix
from fgpt.kernels.quantized_linear import Blockwise8bit, quantize_matrix
from fgpt.kernels.sharded_matrix import Sharded, gather_rows, join_rows, row_range, split_rows
from fgpt.tree import leaves, nbytes


def matrix(form: str, out: int, inp: int) -> Any:
    w = normal_matrix(out, inp)
    if form == "transposed":
        return normal_matrix(inp, out).T
    if form in ("fp32", "bf16"):
        return w.to(torch.float32 if form == "fp32" else torch.bfloat16)
    name, _, plain = form.partition(", ")
    return quantize_matrix(w, name, double_quant=not plain)  # pyright: ignore[reportArgumentType]


FORMS = ["fp32", "bf16", "transposed", *FORMATS, "nf4, plain scales"]


@given(st.sampled_from(FORMS), st.integers(1, 40), st.sampled_from([64, 320]), st.integers(1, 7))
def test_the_parts_together_are_the_whole(form: str, out: int, inp: int, size: int):
    w = matrix(form, out, inp)
    parts = [split_rows(w, rank, size) for rank in range(size)]
    assert same(join_rows(parts), w)
    assert {x.shape for x in parts} == {torch.Size((out, inp))}
    assert {x.part.shape for x in parts} == {torch.Size((-(-out // size), inp))}
    ranges = [row_range(out, rank, size) for rank in range(size)]
    assert [i for rows in ranges for i in range(out)[rows]] == [*range(out)]


@pytest.mark.parametrize("form", FORMS)
def test_a_part_has_the_bytes_of_its_rows(form: str):
    """And those of the code, and of the scales of scales."""
    w = matrix(form, 512, 256)
    part = split_rows(w, 3, 8)
    shared = sum(
        x.nbytes for path, x in leaves({"": w}).items() if path.endswith((".code", ".offset", "absmax.absmax"))
    )
    assert nbytes({"": part}) == (nbytes({"": w}) - shared) // 8 + shared
    assert shared <= 5 * 256


def test_a_block_across_two_rows_is_refused():
    register = quantize_matrix(normal_matrix(4, 64), "blockwise8")
    assert isinstance(register, Blockwise8bit)
    w = Blockwise8bit(register.codes.view(8, 32)[:5], register.absmax[:3], register.code)
    with pytest.raises(fgpt.InputError, match="3 scales of 5 rows: a block lies across two rows"):
        split_rows(w, 0, 2)


def test_without_its_process_group_a_part_has_no_product():
    part = split_rows(normal_matrix(4, 64), 1, 2)
    for use in (gather_rows, fgpt.dense, lambda w: fgpt.linear(normal_matrix(3, 64), w)):
        with pytest.raises(fgpt.InputError, match="part 1 of 2 of a sharded matrix in process 0 of 1: initialize"):
            use(part)


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gathering that asks the other parts of this process, in place of other processes."""

    def split(w: Any) -> Sharded:
        parts = [split_rows(w, rank, 3) for rank in range(3)]
        for module in (sharded_matrix, quantized_linear):
            monkeypatch.setattr(module, "gather_rows", lambda part: join_rows(parts))
        return parts[1]

    return split


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_has_its_derivatives(together: Any, dtype: torch.dtype):
    """Of a product that adds it: by plain autograd, under transforms, and mapped with and without the input."""
    w, x, t = (normal_matrix(*size, seed=seed, dtype=dtype) for seed, size in enumerate([(7, 64), (5, 64), (7,)]))
    biases, part = normal_matrix(3, 7, seed=4, dtype=dtype), together(w)

    def every(w: Any) -> dict[str, Any]:
        leaf = biases[0].clone().requires_grad_()
        y = fgpt.linear(x, w, leaf)
        return {
            "value": fgpt.linear(x, w, biases[0]),
            "autograd": torch.autograd.grad(y.float().sin().sum(), leaf),
            "jvp": torch.func.jvp(lambda b: fgpt.linear(x, w, b), (biases[0],), (t,)),
            "grad": torch.func.grad(lambda b: fgpt.linear(x, w, b).float().sin().sum())(biases[0]),
            "vmap": vmap(lambda b: fgpt.linear(x, w, b))(biases),
            "vmap of both": vmap(lambda x, b: fgpt.linear(x, w, b))(torch.stack([x, 2 * x, -x]), biases),
            "vmap(grad)": vmap(torch.func.grad(lambda b: fgpt.linear(x, w, b).float().sin().sum()))(biases),
        }

    got, expected = every(part), every(w)
    for name in expected:
        assert same({"": got[name]}, {"": expected[name]}), name


def test_mapping_over_parts_is_refused():
    part = split_rows(normal_matrix(4, 64), 0, 1)
    many = Sharded(torch.stack([part.part] * 3), part.out, 0, 1)
    with pytest.raises(fgpt.InputError, match="cannot vmap over sharded weights: map over the adapters"):
        vmap(fgpt.linear)(normal_matrix(3, 2, 64), many)
