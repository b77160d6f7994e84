"""Quantized matrices: bitsandbytes' numbers to the bit, products with them under every transform, and their cost."""

from collections.abc import Callable, Iterator
from inspect import unwrap
from typing import Any, get_args
from unittest import mock

import bitsandbytes.functional as bnb
import pytest
import torch
from builders import LargestTensor, close, same, stack_trees, tiny, tokens, with_noise
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fgpt
from fgpt.kernels import quantized_linear as kernel
from fgpt.kernels.quantized_linear import (
    QUANTIZED,
    Blockwise4bit,
    Blockwise8bit,
    Format,
    RowwiseInt8,
    dequantize,
    fake_quantize,
    quantize_matrix,
    quantized_embedding,
    quantized_linear,
    reference,
    slice_rows,
)
from fgpt.model import Linear
from fgpt.train_step import make_step
from fgpt.tree import astype, leaves, nbytes, replace_at, tree_map, walk

FORMATS: tuple[Format, ...] = get_args(Format)
HALF = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = tiny(d_model=64, d_mlp=128)
X, Y = tokens(31, 2, 9), tokens(31, 2, 9, seed=1)
BATCH = fgpt.Batch(X, Y, torch.ones(2, 9))


def normal(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=fgpt.key(seed)).to(dtype)


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_bitsandbytes(kind: Any, double: bool, dtype: torch.dtype):
    w = normal(48, 320, dtype=dtype)  # 240 scales: not a whole block of them
    ours = quantize_matrix(w, kind, double)
    state: Any
    codes, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=double, quant_type=kind)
    assert isinstance(ours, Blockwise4bit)
    assert torch.equal(ours.codes.flatten(), codes.flatten())
    assert torch.equal(ours.code, state.code)
    if double:
        assert isinstance(ours.absmax, Blockwise8bit)
        assert ours.offset is not None
        assert torch.equal(ours.offset, state.offset)
        assert torch.equal(ours.absmax.codes, state.absmax)
        assert torch.equal(ours.absmax.absmax, state.state2.absmax)
        assert torch.equal(ours.absmax.code, state.state2.code)
    else:
        assert isinstance(ours.absmax, Tensor)
        assert ours.offset is None
        assert torch.equal(ours.absmax, state.absmax)
    expanded = dequantize(ours)
    assert expanded.dtype == dtype
    assert torch.equal(expanded, bnb.dequantize_4bit(codes, state))
    assert (expanded - w).abs().mean() < 0.13 * w.abs().mean()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_eight_bits_by_block_are_bitsandbytes(dtype: torch.dtype):
    w = normal(48, 320, dtype=dtype)
    ours = quantize_matrix(w, "blockwise8")
    state: Any
    codes, state = bnb.quantize_blockwise(w, blocksize=64)
    assert isinstance(ours, Blockwise8bit)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, state.absmax)
    assert torch.equal(ours.code, state.code)
    assert torch.equal(dequantize(ours), bnb.dequantize_blockwise(codes, state))
    assert (dequantize(ours) - w).abs().mean() < 0.02 * w.abs().mean()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_eight_bits_by_row_are_bitsandbytes(dtype: torch.dtype):
    w = normal(48, 100, dtype=dtype)
    ours = quantize_matrix(w, "int8")
    codes, absmax, _ = bnb.int8_vectorwise_quant(w)
    assert isinstance(ours, RowwiseInt8)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, absmax)
    assert (dequantize(ours, torch.float32) - w.float()).abs().max() <= w.float().abs().max() / 127 * 0.51


@given(st.sampled_from(FORMATS), st.booleans(), st.sampled_from(HALF), st.integers(1, 9), st.integers(1, 5), st.data())
def test_the_definition_the_operator_and_the_parts_are_one(
    kind: Any, double: bool, dtype: torch.dtype, rows: int, blocks: int, data: st.DataObject
):
    """Bitwise: `dequantize` is `reference`; `quantized_embedding` and `slice_rows` are its rows."""
    w = quantize_matrix(normal(rows, 64 * blocks, seed=data.draw(st.integers(0, 99)), dtype=dtype), kind, double)
    expanded = dequantize(w)
    assert w.shape == expanded.shape == (rows, 64 * blocks)
    assert torch.equal(reference(w), dequantize(w, torch.float32))
    assert torch.equal(reference(w).to(dtype), expanded)
    chosen = torch.tensor(data.draw(st.lists(st.lists(st.integers(0, rows - 1), min_size=2, max_size=2), min_size=1)))
    assert torch.equal(quantized_embedding(w, chosen), expanded[chosen])
    assert torch.equal(vmap(lambda r: quantized_embedding(w, r))(chosen), expanded[chosen])
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows + 2))
    part = slice_rows(w, slice(start, stop))
    assert type(part) is type(w)
    assert torch.equal(dequantize(part), expanded[start:stop])
    assert part.shape == expanded[start:stop].shape


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_of_zeros_and_large_rows_survive(kind: Any):
    w = normal(4, 64)
    w[1], w[2] = 0, w[2] * 1e30
    expanded = dequantize(quantize_matrix(w, kind, False))
    assert torch.equal(expanded[1], torch.zeros(64)) or kind == "blockwise8"  # whose 0 is 2e-5 of a block's largest
    assert torch.isfinite(expanded).all()
    x = torch.stack([torch.zeros(64), torch.ones(64)])
    assert torch.isfinite(quantized_linear(x, quantize_matrix(w, kind, False))).all()
    assert torch.equal(quantized_linear(x, quantize_matrix(w, kind, False))[0], torch.zeros(4))


# ----------------------------------------------------------------------------------------------------------------- size


@pytest.mark.parametrize(
    ("kind", "double", "most"),
    [
        ("nf4", True, 0.516),
        ("fp4", True, 0.516),
        ("nf4", False, 0.563),
        ("blockwise8", True, 1.063),
        ("int8", True, 1.002),
    ],
)
def test_bytes_a_number(kind: Any, double: bool, most: float):
    """Of 2048 x 2048; the code of 256 values is one for the whole tree."""
    one = quantize_matrix(normal(2048, 2048), kind, double)
    shared = 1024 if isinstance(one, Blockwise8bit) or isinstance(getattr(one, "absmax", None), Blockwise8bit) else 0
    assert most - 0.001 < (nbytes(one) - shared) / 2048**2 <= most
    tree = [one, quantize_matrix(normal(2048, 2048, seed=1), kind, double)]
    assert nbytes(tree) == 2 * (nbytes(one) - shared) + shared


def test_a_quantized_model_weighs_what_its_parts_do():
    """The rest of the tree is shared with the original, not copied; a cast leaves codes and scales alone."""
    for kind in FORMATS:
        frozen = fgpt.quantize(PLAIN, kind)
        matrices = [x for _, x in walk(frozen) if isinstance(x, QUANTIZED) and len(x.shape) == 2]
        assert len(matrices) == 12
        assert nbytes(frozen) < 0.4 * nbytes(PLAIN)
        assert frozen.wte.w is PLAIN.wte.w
        short = leaves(astype(frozen, torch.bfloat16))
        for path, x in leaves(frozen).items():
            inside = ".w." in path
            assert torch.equal(short[path], x) if inside else short[path].dtype == torch.bfloat16
            assert short[path].dtype == (x.dtype if inside else torch.bfloat16)


# ------------------------------------------------------------------------------------------------------------- products


def dequantized_product(x: Tensor, w: Any) -> Tensor:
    """The meaning of a product: x Wᵀ, with x in 8 bits if W is int8, differentiated as if it were not."""
    return F.linear(fake_quantize(x) if isinstance(w, RowwiseInt8) else x, reference(w).to(x.dtype))


@pytest.fixture(autouse=True, scope="module")
def exact_derivatives() -> Iterator[None]:
    """As on a CPU that does not multiply bf16."""
    with mock.patch.object(kernel, "HAS_BF16_MATMUL", False):
        yield


@pytest.fixture(params=FORMATS)
def w(request: pytest.FixtureRequest) -> Any:
    return quantize_matrix(normal(5, 64), request.param)


@pytest.mark.parametrize("size", [(64,), (0, 64), (1, 64), (3, 64), (2, 3, 64)], ids=str)
def test_a_product_is_one_with_the_expanded_matrix(w: Any, size: tuple[int, ...]):
    x = normal(*size, seed=1)
    close(quantized_linear(x, w), dequantized_product(x, w), 1e-5)
    for dtype in (torch.bfloat16, torch.float16):
        y = quantized_linear(x.to(dtype), w)
        assert y.dtype == dtype
        close(y.float(), dequantized_product(x.to(dtype), w).float(), 0.1, 0.02)


def test_rounding_is_half_a_step_and_differentiates_as_nothing():
    x = normal(4, 64) * torch.tensor([[1.0], [1e-3], [1e3], [0.0]])
    step = x.abs().amax(-1, keepdim=True) / 127
    got = fake_quantize(x)
    assert ((got - x).abs() <= step * 0.50001).all()
    assert (got - x).abs().amax(-1)[:3].gt(0.4 * step[:3, 0]).all()
    whole = got[:3] / step[:3]
    close(whole, whole.round(), 1e-3)
    close(grad(lambda x: (fake_quantize(x) * normal(4, 64)).sum())(x), normal(4, 64), 0)
    close(jvp(fake_quantize, (x,), (torch.ones_like(x),))[1], torch.ones_like(x), 0)


def test_products_under_every_transform(w: Any):
    """Against torch's own product with the expanded matrix: values and all derivatives."""
    x, t = normal(3, 64, seed=1), normal(3, 64, seed=2)

    def of(multiply: Callable[[Tensor, Any], Tensor]) -> dict[str, Any]:
        def f(x: Tensor) -> Tensor:
            return (multiply(x, w) / 8).sin().square().sum()

        return {
            "value": f(x),
            "grad": grad(f)(x),
            "vmap": vmap(lambda x: multiply(x, w))(x),
            "vmap over columns": vmap(lambda x: multiply(x, w), in_dims=1)(x.T),
            "vmap of vmap": vmap(vmap(lambda x: multiply(x, w)))(torch.stack([x, t])),
            "vmap(grad)": vmap(grad(f))(x),
            "grad of vmap": grad(lambda x: vmap(f)(x).sum())(x),
            "jvp": jvp(f, (x,), (t,)),
            "vjp": vjp(lambda x: multiply(x, w), x)[1](normal(3, 5, seed=3)),
            "jvp(grad)": jvp(grad(f), (x,), (t,)),
            "grad(grad)": grad(lambda x: (grad(f)(x) * t).sum())(x),
            "vmap(jvp(grad))": vmap(lambda x, t: jvp(grad(f), (x,), (t,))[1])(x, t),
            "third": grad(lambda x: jvp(grad(f), (x,), (t,))[1].square().sum())(x),
            "hessian": hessian(f)(x[0]),
            "jacobian": jacrev(lambda x: multiply(x, w))(x[0]),
        }

    got, expected = of(quantized_linear), of(dequantized_product)
    for name in expected:
        a, b = (x[name] if isinstance(x[name], tuple) else (x[name],) for x in (got, expected))
        assert max(y.abs().max() for y in b) > 1e-3, name
        for y, z in zip(a, b, strict=True):
            torch.testing.assert_close(y, z, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_autograds_double_backward(w: Any):
    x, t = normal(3, 64, seed=1).requires_grad_(), normal(3, 64, seed=2)

    def twice(multiply: Callable[[Tensor, Any], Tensor]) -> tuple[Tensor, Tensor]:
        (first,) = torch.autograd.grad((multiply(x, w) / 8).sin().square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first * t).sum(), x)
        return first.detach(), second

    for got, expected in zip(twice(quantized_linear), twice(dequantized_product), strict=True):
        close(got, expected, 2e-5, 1e-4)
        assert expected.abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_derivatives_in_bf16_round_what_they_take_and_give_and_no_weight(monkeypatch: pytest.MonkeyPatch, dtype: Any):
    """Over whole numbers in fp32 or bf16, forward and backward; the value, and other dtypes, stay as they are."""
    w = quantize_matrix(normal(96, 128) * torch.logspace(-2, 2, 96)[:, None], "int8")
    x, t, g = normal(5, 128, seed=1).to(dtype), normal(5, 128, seed=2).to(dtype), normal(5, 96, seed=3).to(dtype)
    row, codes = w.absmax.double() / 127, w.codes.double()

    def short(y: Tensor) -> Tensor:
        return y.to(torch.bfloat16).double()

    def value_and_derivatives() -> tuple[Tensor, Tensor, Tensor]:
        (y, tangent), (back,) = (
            jvp(lambda x: quantized_linear(x, w), (x,), (t,)),
            vjp(lambda x: quantized_linear(x, w), x)[1](g),
        )
        assert y.dtype == tangent.dtype == back.dtype == dtype
        return y, tangent, back

    y, *exact = value_and_derivatives()
    monkeypatch.setattr(kernel, "HAS_BF16_MATMUL", True)
    same, tangent, back = value_and_derivatives()
    assert torch.equal(same, y)
    if dtype in (torch.float32, torch.bfloat16):
        # the product is rounded to 8 bits, and again where scaling it follows
        for got, want in ((tangent, short(t) @ codes.T * row), (back, short(g.float() * row.float()) @ codes)):
            far = (1.02 + (dtype == torch.bfloat16)) * want.abs() / 2**8 + 1e-6 * want.abs().max()
            assert ((got.double() - want).abs() <= far).all()
            assert (short(got) - want).abs().max() > 1e-4 * want.abs().max()
    else:
        assert torch.equal(tangent, exact[0])
        assert torch.equal(back, exact[1])


def test_mapping_over_quantized_weights_is_refused():
    many = stack_trees([quantize_matrix(normal(5, 64, seed=i), "nf4") for i in range(3)])
    for axes in ((None, 0), (0, 0)):
        with pytest.raises(fgpt.InputError, match="cannot vmap over quantized weights: map over the adapters"):
            vmap(quantized_linear, in_dims=axes)(normal(3, 64), many)


class Expansions(TorchDispatchMode):
    """Every storage of floats as large as a matrix, and whether anything still holds it."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.storages = numel, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point() and out.numel() >= self.numel:
            self.storages.append(StorageWeakRef(out.untyped_storage()))
        return out

    def num_alive(self) -> int:
        return sum(not ref.expired() for ref in self.storages)


def test_a_product_makes_its_matrix_and_nothing_as_large_beside_it():
    w = quantize_matrix(normal(256, 1024), "nf4")
    with LargestTensor() as largest:
        quantized_linear(normal(2, 1024), w)
    assert sorted(s for s in largest.shapes if torch.Size(s).numel() > 256 * 1024 // 2) == [(256, 1024)]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
def test_no_expanded_matrix_waits_for_the_backward(kind: Any, adapted: bool):
    """Whether saved by autograd or kept by hand."""
    out, inp = 96, 128
    w: Any = quantize_matrix(normal(out, inp), kind)
    x, saved = normal(3, inp, seed=1).requires_grad_(), []
    if adapted:
        a, b = normal(2, inp, seed=2).requires_grad_(), normal(out, 2, seed=3).requires_grad_()
        w = fgpt.Adapted(w, a, b, torch.ones(out, requires_grad=True), torch.ones(inp, requires_grad=True))

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with Expansions(out * inp) as expansions, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = fgpt.linear(x, w)
        in_forward = len(expansions.storages)
        assert expansions.num_alive() == 0
        assert not [t for t in saved if t.is_floating_point() and t.numel() >= out * inp]
        y.square().sum().backward()
        assert len(expansions.storages) > max(in_forward, 0 if kind == "int8" else 1)  # expanded anew, and let go
        assert expansions.num_alive() == 0
    assert x.grad is not None


# --------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("kind", FORMATS)
def test_a_quantized_model_is_the_model_of_its_numbers(kind: Any):
    frozen = fgpt.quantize(PLAIN, kind)
    expected = fgpt.apply(fgpt.merge(frozen, base="dequantized"), X)
    logits = fgpt.apply(frozen, X)
    assert logits.shape == expected.shape
    rounding = (logits - expected).abs().max() / expected.std()
    assert (1e-3 < rounding < 0.2) if kind == "int8" else (rounding < 1e-5)
    assert 1e-3 < (logits - fgpt.apply(PLAIN, X)).abs().mean() / expected.std() < 0.5


@pytest.mark.parametrize("kind", FORMATS)
def test_embedding_by_a_quantized_table(kind: Any):
    """Tied: rows of it, and products with all of it; under vmap too."""
    frozen = fgpt.quantize(PLAIN, kind, target="wte|wpe")
    tables = fgpt.merge(frozen, base="dequantized")
    close(fgpt.hidden(frozen, X), fgpt.hidden(tables, X), 1e-6)
    close(fgpt.loss(frozen, BATCH), fgpt.loss(tables, BATCH), 1e-5)
    close(vmap(fgpt.hidden, in_dims=(None, 0))(frozen, X), fgpt.hidden(tables, X), 1e-5)
    assert torch.equal(vmap(lambda r: fgpt.embed(r, frozen.wte.w))(X), fgpt.embed(X, tables.wte.w))
    lora = with_noise(fgpt.lora(frozen, fgpt.key(0), 2, target="wte"))
    close(fgpt.hidden(fgpt.adapt(frozen, lora), X), fgpt.hidden(fgpt.adapt(tables, lora), X), 1e-5)


@pytest.mark.parametrize("method", [fgpt.lora, fgpt.dora])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "blockwise8"])
def test_adapters_over_a_quantized_base_have_the_gradient_over_its_numbers(kind: Any, method: Any):
    frozen = fgpt.quantize(PLAIN, kind)
    plain, adapters = fgpt.merge(frozen, base="dequantized"), with_noise(method(frozen, fgpt.key(0), 2))
    got, expected = (grad(lambda a, p=p: fgpt.loss(fgpt.adapt(p, a), BATCH))(adapters) for p in (frozen, plain))
    close(got, expected, 1e-5)
    rows = fgpt.Batch(X, Y, torch.ones(2, 9))
    got, expected = (
        vmap(grad(lambda a, b, p=p: fgpt.loss(fgpt.adapt(p, a), b)), in_dims=(None, 0))(adapters, rows)
        for p in (frozen, plain)
    )
    close(got, expected, 1e-5)
    along = tree_map(torch.ones_like, adapters)
    got, expected = (
        jvp(grad(lambda a, p=p: fgpt.loss(fgpt.adapt(p, a), BATCH)), (adapters,), (along,))[1] for p in (frozen, plain)
    )
    close(got, expected, 2e-4, 1e-4)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("method", [fgpt.lora, fgpt.dora, lambda p, _: fgpt.ia3(p)], ids=["lora", "dora", "ia3"])
def test_training_leaves_the_frozen_tree_as_it_is_bitwise(kind: Any, method: Any):
    frozen = fgpt.quantize(PLAIN, kind)
    before = {path: x.clone() for path, x in leaves(frozen).items()}
    adapters, optimizer = method(frozen, fgpt.key(0)), fgpt.adamw(3e-2)
    step = make_step(lambda a, p, batch, rng: fgpt.nll(fgpt.adapt(p, a, rng=rng), batch), optimizer)
    state, losses = fgpt.init_state(adapters, optimizer), []
    for i in range(8):
        state, metrics = step(state, frozen, [BATCH], fgpt.fold_in(fgpt.key(0), i))
        losses.append(metrics.loss.item())
    assert same(before, leaves(frozen))
    assert losses[-1] < losses[0] - 0.05
    assert not same(state.trainable, adapters)


# ---------------------------------------------------------------------------------------------------- output difference


def test_output_difference_is_that_of_logits_and_losses():
    zero = fgpt.compare_outputs(PLAIN, PLAIN, BATCH)
    assert (zero.logit.item(), zero.nll.item()) == (0.0, 0.0)
    for after in (fgpt.quantize(PLAIN, "nf4"), astype(PLAIN, torch.bfloat16), with_noise(PLAIN)):
        got = fgpt.compare_outputs(PLAIN, after, BATCH)
        a, b = (fgpt.apply(p, X) for p in (PLAIN, after))
        assert got.logit == max(abs(x - y) for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
        mean = [F.cross_entropy(z.flatten(0, 1).float(), Y.flatten()) for z in (a, b)]
        close(got.nll, mean[1] - mean[0], 1e-2 if a.dtype != b.dtype else 1e-5)
        assert got.logit > 1e-3
        assert fgpt.compare_outputs(after, PLAIN, BATCH).logit == got.logit  # whichever way it went
        assert not got.logit.requires_grad


def test_merging_is_measured_by_output_difference():
    """With the values trained on, merging costs only rounding; with those before quantization, its error."""
    frozen = fgpt.quantize(PLAIN, "nf4")
    adapted = fgpt.adapt(frozen, with_noise(fgpt.lora(frozen, fgpt.key(0), 4), 0.02))
    exact = fgpt.compare_outputs(adapted, fgpt.merge(adapted, base="dequantized"), BATCH)
    original = fgpt.compare_outputs(adapted, fgpt.merge(adapted, base=PLAIN), BATCH)
    assert exact.logit < 1e-4
    assert original.logit > 100 * exact.logit


# --------------------------------------------------------------------------------------------------------------- errors

NF4 = fgpt.quantize(PLAIN, "nf4")
ADAPTED = fgpt.adapt(NF4, fgpt.lora(NF4, fgpt.key(0), 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: unwrap(fgpt.quantize)(PLAIN, "nf5"),  # as users run it: here every type is checked first
            "format is 'nf5': expected one of nf4, fp4, int8, blockwise8",
        ),
        (
            lambda: fgpt.quantize(NF4),
            r"blocks\.0\.attn\.q is Blockwise4bit already: quantize a plain params tree, then adapt",
        ),
        (
            lambda: fgpt.quantize(fgpt.adapt(PLAIN, fgpt.lora(PLAIN, fgpt.key(0), 2))),
            r"blocks\.0\.attn\.q is Adapted already: quantize a plain params tree, then adapt it",
        ),
        (lambda: fgpt.quantize(tiny()), r"blocks\.0\.attn\.q has rows of 16 elements: nf4 needs a multiple of 64"),
        (lambda: fgpt.quantize(tiny(), "blockwise8"), "has rows of 16 elements: blockwise8 needs a multiple of 64"),
        (lambda: fgpt.quantize(PLAIN, target=r"blocks\..*\.c_attn"), r"matches no path; nearest are blocks\.\d\.attn"),
        (lambda: fgpt.quantize(PLAIN, target=r".*ln_1"), "matches no path; nearest are"),
        (
            lambda: fgpt.trainable_leaves(NF4),
            r"cannot tune blocks\.0\.attn\.q\.w, which is quantized: narrow the target",
        ),
        (
            lambda: fgpt.trainable_leaves(NF4, r".*\.absmax\.codes"),
            r"cannot tune blocks\.0\.attn\.q\.w, which is quantized",
        ),
        (
            lambda: fgpt.adapt(NF4, {"blocks.0.attn.q.w": torch.ones(64, 64)}),
            r"no leaf 'blocks\.0\.attn\.q\.w' to replace",
        ),
        (lambda: fgpt.lora(NF4, fgpt.key(0), rank=65), r"rank 65 on blocks\.0\.attn\.q: expected 1 to 64"),
        (
            lambda: fgpt.adapt(NF4, {"blocks.0.mlp.up": fgpt.IA3(torch.ones(64))}),
            r"IA3 at blocks\.0\.mlp\.up scales 64 components, but the base has 128",
        ),
        (
            lambda: fgpt.merge(ADAPTED),
            r"blocks\.0\.attn\.q\.w has a quantized base: merge\(params, base=\"dequantized\"\)",
        ),
        (
            lambda: fgpt.merge(ADAPTED, base="original"),
            "merge with base 'original': expected \"dequantized\" or a params tree",
        ),
        (
            lambda: fgpt.merge(ADAPTED, base=tiny()),
            r"blocks\.0\.attn\.q\.w is not in the params given as base, or has another shape there",
        ),
        (
            lambda: fgpt.merge(ADAPTED, base=fgpt.fuse_qkv(PLAIN)),
            r"blocks\.0\.attn\.q\.w is not in the params given as base",
        ),
        (lambda: fgpt.merge(NF4, base=tiny(d_model=64, d_mlp=64)), r"blocks\.0\.mlp\.up\.w is not in the params"),
    ],
)
def test_what_does_not_fit_is_named(make: Callable[[], Any], message: str):
    with pytest.raises(fgpt.InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_narrow_matrices_may_be_int8_and_the_rest_tuned():
    """int8 wants no blocks; a target narrowed past what is quantized tunes."""
    narrow = tiny()
    assert isinstance(fgpt.quantize(narrow, "int8").blocks[0].attn.o.w, RowwiseInt8)
    assert fgpt.num_trainable(fgpt.trainable_leaves(NF4, r".*ln_.*|.*\.b")) > 0
    mixed = fgpt.quantize(fgpt.quantize(PLAIN, "nf4", target=r".*\.mlp\..*"), "int8", target=r".*\.attn\..*")
    assert {type(x.w) for _, x in walk(mixed) if isinstance(x, Linear)} == {Blockwise4bit, RowwiseInt8}
    partly = fgpt.adapt(replace_at(NF4, {"blocks.0.attn.q.w": PLAIN.blocks[0].attn.q.w}), {})  # pyright: ignore
    adapters = with_noise(fgpt.lora(partly, fgpt.key(0), 2, target=r"blocks\.0\.attn\.q"))
    merged = fgpt.merge(fgpt.adapt(partly, adapters))  # nothing adapted is quantized, so nothing has to be said
    assert isinstance(merged.blocks[0].attn.q.w, Tensor)  # pyright: ignore
    assert isinstance(merged.blocks[1].attn.q.w, Blockwise4bit)  # pyright: ignore
