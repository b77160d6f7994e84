"""Adapters as param transforms: the laws of the weight algebra, one by one, and against PEFT."""

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import LargestTensor, close, gpt2_shape, same, stack_trees, tiny, tokens, with_noise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn import functional as F

import fgpt
from fgpt.adapters import weight_matrices
from fgpt.kernels.quantized_linear import QUANTIZED, Format, RowwiseInt8, dequantize, quantize_matrix, reference
from fgpt.model import Linear
from fgpt.train_step import make_step
from fgpt.tree import astype, leaves, num_elements, replace_at, tree_map, walk
from fgpt.weights import linear_terms, row_norms

LINEARS = r"blocks\.\d+\.(attn|mlp)\.\w+"
X, Y = tokens(31, 2, 9), tokens(31, 2, 9, seed=1)
BATCH = fgpt.Batch(X, Y, torch.ones(2, 9))
PLAIN = tiny(d_model=64, d_mlp=128)  # rows of whole blocks, as every format wants them
BASES: dict[str, fgpt.GPT] = {
    "fp32": PLAIN,
    "bf16": astype(PLAIN, torch.bfloat16),
    "nf4": fgpt.quantize(PLAIN, "nf4"),
    "int8": fgpt.quantize(PLAIN, "int8"),
    "blockwise8": fgpt.quantize(PLAIN, "blockwise8"),
    "nf4 of bf16": fgpt.quantize(astype(PLAIN, torch.bfloat16), "nf4"),
}
FRESH: dict[str, Callable[[fgpt.GPT], fgpt.Adapters]] = {
    "lora": lambda p: fgpt.lora(p, fgpt.key(0), 4, target=LINEARS),
    "rs": lambda p: fgpt.lora(p, fgpt.key(0), 4, target=LINEARS, rs=True),
    "dora": lambda p: fgpt.dora(p, fgpt.key(0), 4, target=LINEARS),
    "ia3": lambda p: fgpt.ia3(p, rows=LINEARS, cols=LINEARS),
    "lora and dropout": lambda p: fgpt.lora(p, fgpt.key(0), 4, target=LINEARS, dropout=0.5),
}


def loss_of(params: fgpt.GPT) -> Callable[[fgpt.Adapters], Tensor]:
    return lambda adapters: fgpt.loss(fgpt.adapt(params, adapters), BATCH)


def step_loss(adapters: Any, params: Any, batch: fgpt.Batch, rng: Tensor | None) -> tuple[Tensor, Tensor]:
    return fgpt.nll(fgpt.adapt(params, adapters, rng=rng), batch)


def near(got: Tensor, expected: Tensor, rel: float = 1e-5) -> None:
    """Close, as a part of the largest number: what fp32 can promise of a sum that cancels."""
    close(got.double(), expected.double(), rel * expected.abs().max().item())


# -------------------------------------------------------------------------------------------------------------- counts


def test_counts():
    small, medium = gpt2_shape(12, 12, 768), gpt2_shape(24, 16, 1024)
    assert fgpt.num_trainable(fgpt.lora(small, fgpt.key(0), 8, target=r"blocks\..*\.attn\.[qkvo]")) == 589_824
    assert fgpt.num_trainable(fgpt.lora(fgpt.fuse_qkv(small), fgpt.key(0), 8, target=r"blocks\..*\.(qkv|o)")) == 442_368
    assert fgpt.num_trainable(fgpt.lora(medium, fgpt.key(0), 4, target=r"blocks\..*\.attn\.(q|v)")) == 393_216
    fused = r"blocks\..*\.(attn\.qkv|attn\.o|mlp\.down)"
    assert fgpt.num_trainable(fgpt.lora(fgpt.fuse_qkv(small), fgpt.key(0), 8, target=fused)) == 811_008
    assert fgpt.num_trainable(fgpt.trainable_leaves(small)) == 124_439_808


# ---------------------------------------------------------------------------------------------- beginning and training


@pytest.mark.parametrize("method", FRESH)
@pytest.mark.parametrize("base", BASES)
def test_at_init_the_adapted_model_is_the_base_bitwise(base: str, method: str):
    params, adapters = BASES[base], FRESH[method](BASES[base])
    logits, adapted = fgpt.apply(params, X), fgpt.adapt(params, adapters)
    assert fgpt.apply(adapted, X).dtype == logits.dtype
    assert torch.equal(fgpt.apply(adapted, X), logits)
    is_adapted = [isinstance(x.w, fgpt.Adapted) for _, x in walk(adapted) if isinstance(x, Linear)]
    assert is_adapted == [True] * len(adapters)
    if base in ("fp32", "bf16"):
        assert same(fgpt.merge(adapted), params)
    else:
        original = BASES["bf16" if "bf16" in base else "fp32"]
        assert same(fgpt.merge(adapted, base=original), original)


def test_a_table_too_is_itself_at_init(gpt: fgpt.GPT):
    for adapters in (fgpt.lora(gpt, fgpt.key(0), 4, target="wte|wpe"), fgpt.dora(gpt, fgpt.key(0), 4, target="wte")):
        assert torch.equal(fgpt.apply(fgpt.adapt(gpt, adapters), X), fgpt.apply(gpt, X))
        assert same(fgpt.merge(fgpt.adapt(gpt, adapters)), gpt)


def test_a_step_moves_every_adapter_and_nothing_else(gpt: fgpt.GPT):
    """With B = 0 the gradient of A is zero, so the first step moves every B and no A; the second moves all."""
    adapters, optimizer = fgpt.lora(gpt, fgpt.key(0), 4, target=LINEARS), fgpt.adamw(1e-2)
    before = {path: x.clone() for path, x in leaves(gpt).items()}
    step = fgpt.make_step(step_loss, optimizer)
    zero = fgpt.init_state(adapters, optimizer)
    one, _ = step(zero, gpt, [BATCH], None)
    two, _ = step(one, gpt, [BATCH], None)
    assert same(before, leaves(gpt))
    old, new, newer = (leaves(state.trainable) for state in (zero, one, two))
    assert [len(x) for x in (old, new, newer)] == [24] * 3
    for path in old:
        assert torch.equal(old[path], new[path]) == path.endswith("/a")
        assert not torch.equal(new[path], newer[path])


# ------------------------------------------------------------------------------------------------------------ the laws

OUT, IN = 7, 64


def matrix(kind: str, *size: int, seed: int = 0) -> Any:
    w = torch.randn(*size, generator=fgpt.key(seed)) / 8
    formats: dict[str, Format] = {"nf4": "nf4", "fp4": "fp4", "int8": "int8", "blockwise8": "blockwise8"}
    return (
        quantize_matrix(w, formats[kind])
        if kind in formats
        else w.to({"fp32": torch.float32, "bf16": torch.bfloat16}[kind])
    )


@st.composite
def weights(draw: st.DrawFn, *kinds: str, columns: bool = True) -> Any:
    """A weight of one to three layers of the normal form, each with any of its three parts, over a frozen matrix."""
    seed = draw(st.integers(0, 999))
    w: Any = matrix(draw(st.sampled_from(kinds)), OUT, IN, seed=seed)
    rng = torch.Generator().manual_seed(seed + 1)
    for _ in range(draw(st.integers(1, 3))):
        rank, scale = draw(st.integers(0, 4)), draw(st.sampled_from([0.5, 8.0]))
        a, b = (torch.randn(*size, generator=rng) for size in ((rank, IN), (OUT, rank)))
        row, col = (1 + torch.randn(n, generator=rng) for n in (OUT, IN))  # of either sign
        keep = draw(st.booleans()), columns and draw(st.booleans())
        parts = (a, b) if rank else (None, None)
        w = fgpt.Adapted(w, *parts, row if keep[0] else None, col if keep[1] else None, scale=scale)
    return w


def meaning(w: Any) -> Tensor:
    """What `w` is defined to be, in float64."""
    if not isinstance(w, fgpt.Adapted):
        return (reference(w) if isinstance(w, QUANTIZED) else w).double()
    v = meaning(w.base)
    if w.a is not None and w.b is not None:
        v = v + w.scale * torch.einsum("or,ri->oi", w.b.double(), w.a.double())
    rows = torch.ones(OUT) if w.row is None else w.row
    return torch.diag(rows.double()) @ v @ torch.diag((torch.ones(IN) if w.col is None else w.col).double())


@settings(max_examples=60)
@given(weights("fp32", "nf4", "fp4", "blockwise8"), st.sampled_from([(), (1,), (2, 3)]), st.booleans())
def test_linear_embed_and_products_are_dense(w: Any, batch: tuple[int, ...], biased: bool):
    x = torch.randn(*batch, IN, generator=fgpt.key(1))
    bias = torch.randn(OUT, generator=fgpt.key(2)) if biased else None
    exact = x.double() @ meaning(w).T
    near(fgpt.dense(w), meaning(w), 1e-6)
    near(fgpt.linear(x, w, bias), exact if bias is None else exact + bias.double())
    near(torch.stack([y @ m.T for y, m in linear_terms(x, w)]).sum(0), exact)
    rows = tokens(OUT, *batch)
    near(fgpt.embed(rows, w), meaning(w)[rows])


def float_parts(w: Any) -> list[Tensor]:
    """The tensors of `w` that have a gradient."""
    if not isinstance(w, fgpt.Adapted):
        return [w] if isinstance(w, Tensor) else []
    return [x for x in (w.a, w.b, w.row, w.col) if x is not None] + float_parts(w.base)


def positive(w: Any) -> Any:
    """`w` with every number's magnitude: what is summed there says how far fp32 can be trusted."""
    if not isinstance(w, fgpt.Adapted):
        return meaning(w).detach().abs()
    parts = [None if x is None else x.detach().abs() for x in (w.a, w.b, w.row, w.col)]
    return fgpt.Adapted(positive(w.base), *parts, scale=w.scale)


@settings(max_examples=100)
@given(weights("fp32", "nf4"), st.sampled_from([(), (1,), (2, 3)]), st.booleans())
def test_gradients_of_linear_are_those_of_dense(w: Any, batch: tuple[int, ...], biased: bool):
    """By plain autograd, where a product is written over if nobody else reads it."""
    x, u = torch.randn(*batch, IN, generator=fgpt.key(1)), torch.randn(*batch, OUT, generator=fgpt.key(3))
    bias = [torch.randn(OUT, generator=fgpt.key(2))] if biased else []

    def gradients(x: Tensor, w: Any, bias: list[Tensor], u: Tensor, fn: Any) -> tuple[Tensor, ...]:
        inputs = [t.requires_grad_() for t in (x, *bias, *float_parts(w))]
        return torch.autograd.grad(fn(x, w, *bias), inputs, u)

    def exact(x: Tensor, w: Any, *bias: Tensor) -> Tensor:
        return x.double() @ meaning(w).T + sum(bias)

    found, true = gradients(x, w, bias, u, fgpt.linear), gradients(x, w, bias, u.double(), exact)
    # and last, that of a matrix which `w` holds quantized
    sizes = gradients(x.detach().abs(), positive(w), bias, u.double().abs(), exact)
    for got, expected, size in zip(found, true, sizes[: len(true)], strict=True):
        close(got.double(), expected.double(), 1e-5 * size.max().item())


@pytest.mark.parametrize("base", ["fp32", "nf4", "int8"])
@pytest.mark.parametrize("row", [None, torch.ones(OUT)], ids=["LoRA", "DoRA"])
def test_an_adapted_product_is_one_tensor(base: str, row: Tensor | None):
    """The update is added, and the scale applied, where the product lies, which is as many as without."""
    x, w = torch.randn(3, 5, IN, generator=fgpt.key(1)), matrix(base, OUT, IN)
    a, b = torch.randn(2, IN).requires_grad_(), torch.randn(OUT, 2).requires_grad_()
    with LargestTensor() as bare:
        fgpt.linear(x.view(15, IN), w)
    with LargestTensor() as adapted:
        fgpt.linear(x, fgpt.Adapted(w, a, b, row))
    assert adapted.shapes.count((15, OUT)) == bare.shapes.count((15, OUT)) > 0
    assert (3, 5, OUT) not in adapted.shapes


def rounding(x: Tensor, w: Any) -> Tensor:
    """x dense(w)ᵀ, but that the frozen matrix sees each row of its input in 8 bits: in float64, once rounded."""
    if isinstance(w, RowwiseInt8):
        step = x.abs().amax(-1, keepdim=True) / 127
        return ((x / step).round().double() * step.double()) @ meaning(w).T
    x = x if w.col is None else x * w.col
    y = rounding(x, w.base)
    if w.a is not None:
        y = y + w.scale * x.double() @ w.a.double().T @ w.b.double().T
    return y if w.row is None else y * w.row.double()


@given(weights("int8"), st.sampled_from([(), (1,), (2, 3)]), st.booleans())
def test_over_whole_numbers_linear_is_dense_of_the_rounded_input(w: Any, batch: tuple[int, ...], biased: bool):
    x = torch.randn(*batch, IN, generator=fgpt.key(1))
    bias = torch.randn(OUT, generator=fgpt.key(2)) if biased else None
    expected, exact = rounding(x, w), x.double() @ meaning(w).T
    near(fgpt.linear(x, w, bias), expected if bias is None else expected + bias.double())
    near(torch.stack([y @ m.T for y, m in linear_terms(x, w)]).sum(0), exact)  # a head's products are not rounded
    rows = tokens(OUT, *batch)
    near(fgpt.embed(rows, w), meaning(w)[rows])


@given(st.integers(0, 99), st.sampled_from([1e-3, 1.0, 1e3]), st.integers(0, 3))
def test_the_error_of_whole_numbers_has_its_bound(seed: int, size: float, outliers: int):
    """A number is at most half a step off, and a step is max|x| / 127 of its own row:

    |y_j - x·w_j| <= max|x| / 254 · ‖w_j‖₁
    """
    x = torch.randn(5, IN, generator=fgpt.key(seed)) * size
    x[:, :outliers] *= 50
    w = matrix("int8", OUT, IN, seed=seed)
    exact, bound = x.double() @ meaning(w).T, x.abs().amax(-1, keepdim=True) / 254 * meaning(w).abs().sum(-1)
    error = (fgpt.linear(x, w) - exact).abs()
    assert (error <= bound + 1e-6 * exact.abs().max()).all()
    assert error.max() > bound.min() / 100  # it is a rounded product that is bounded


# ------------------------------------------------------------------------------------------------- merged and factored


def over(outer: Callable[[Any], fgpt.Adapters], inner: Callable[[Any], fgpt.Adapters]) -> Callable[[Any], list[Any]]:
    """Two trees, the outer made for the base under the inner."""

    def make(p: fgpt.GPT) -> list[Any]:
        first = with_noise(inner(p), seed=1)
        return [first, with_noise(outer(fgpt.adapt(p, first)), seed=2)]

    return make


def one(make: Callable[[fgpt.GPT], fgpt.Adapters]) -> Callable[[fgpt.GPT], list[Any]]:
    return lambda p: [with_noise(make(p), seed=1)]


ATTN, MLP = r"blocks\..*\.attn\.\w", r"blocks\..*\.mlp\.\w+"
METHODS: dict[str, Callable[[fgpt.GPT], list[Any]]] = {
    **{name: one(make) for name, make in FRESH.items()},
    "ia3 of the paper": one(fgpt.ia3),
    "norms": one(lambda p: fgpt.trainable_leaves(p, r".*ln_.*")),
    "biases": one(lambda p: fgpt.trainable_leaves(p, r".*\.b")),
    "lora | tune": one(lambda p: FRESH["lora"](p) | fgpt.trainable_leaves(p, r".*ln_.*|.*\.b|wpe.*")),
    "ia3 | tune": one(lambda p: FRESH["ia3"](p) | fgpt.trainable_leaves(p, r".*\.b")),
    "dora | tune": one(lambda p: FRESH["dora"](p) | fgpt.trainable_leaves(p, r".*\.b")),
    "lora 4 | lora 16": one(
        lambda p: fgpt.lora(p, fgpt.key(0), 4, target=ATTN) | fgpt.lora(p, fgpt.key(1), 16, 7, target=MLP)
    ),
    "lora | dora | ia3": one(
        lambda p: (
            fgpt.lora(p, fgpt.key(0), 4, target=ATTN)
            | fgpt.dora(p, fgpt.key(1), 2, target=r".*\.up")
            | fgpt.ia3(p, r".*\.down", None)
        )
    ),
    **{
        f"{outer} over {inner}": over(FRESH[outer], FRESH[inner])
        for outer in ("lora", "dora", "ia3")
        for inner in ("lora", "dora", "ia3")
    },
    "tied table": one(lambda p: fgpt.lora(p, fgpt.key(0), 4, target="wte|wpe")),
    "tied table, dora": one(lambda p: fgpt.dora(p, fgpt.key(0), 4, target="wte")),
}


@pytest.fixture
def exact_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 products without the rounding of their input, which the laws above cover."""
    for module in ("linear", "scaled_linear"):
        name = f"fgpt.kernels.{module}.quantized_linear"
        monkeypatch.setattr(name, lambda x, w: F.linear(x, dequantize(w, x.dtype)))


@pytest.mark.usefixtures("exact_int8")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", ["fp32", "nf4", "int8", "blockwise8"])
def test_merged_is_factored(base: str, method: str):
    params = BASES[base]
    adapted = fgpt.adapt(params, *METHODS[method](params))
    merged = fgpt.merge(adapted, base=None if base == "fp32" else "dequantized")
    assert not any(isinstance(x, (fgpt.Adapted, *QUANTIZED)) for _, x in walk(merged))
    assert {p: x.shape for p, x in leaves(merged).items()} == {p: x.shape for p, x in leaves(PLAIN).items()}
    near(fgpt.apply(merged, X), fgpt.apply(adapted, X))
    assert (fgpt.apply(merged, X) - fgpt.apply(params, X)).abs().max() > 0.1
    near(fgpt.loss(merged, BATCH), fgpt.loss(adapted, BATCH))


@pytest.mark.parametrize("method", [m for m in METHODS if "dora" not in m])
def test_merging_onto_the_original_is_adapting_it(method: str):
    """Whatever the base was quantized to; but for DoRA, whose row scales were those of the quantized rows."""
    for base in ("nf4", "int8"):
        trees = METHODS[method](BASES[base])
        merged = fgpt.merge(fgpt.adapt(BASES[base], *trees), base=PLAIN)
        assert same(merged, fgpt.merge(fgpt.adapt(PLAIN, *trees)))


@pytest.mark.parametrize("target", ["head", rf"wte|head|{LINEARS}"])
def test_merged_is_factored_for_a_head_of_its_own(target: str):
    params = tiny(tie_word_embeddings=False)
    for adapters in (
        with_noise(fgpt.lora(params, fgpt.key(0), 2, target=target)),
        with_noise(fgpt.dora(params, fgpt.key(0), 2, target=target)),
        with_noise(fgpt.ia3(params, "head", "head")),
    ):
        adapted = fgpt.adapt(params, adapters)
        near(fgpt.apply(fgpt.merge(adapted), X), fgpt.apply(adapted, X))
        near(fgpt.loss(fgpt.merge(adapted), BATCH), fgpt.loss(adapted, BATCH))
        assert (fgpt.apply(adapted, X) - fgpt.apply(params, X)).abs().max() > 0.1


def test_merging_adapters_that_are_not_there_changes_nothing():
    for params in BASES.values():
        assert same(fgpt.merge(params), params)


@given(st.integers(1, 3), st.booleans(), st.integers(0, 9))
def test_merged_is_factored_for_stacks_fused_and_not(stacked: int, fused: bool, seed: int):
    """Stacked adapters too, and on a tied table, where one adapter moves embedding and head together."""
    params = fgpt.fuse_qkv(tiny()) if fused else tiny()
    trees = [
        with_noise(fgpt.lora(params, fgpt.key(i), 1 + i, target=rf"wte|wpe|{LINEARS}"), seed=seed + i)
        for i in range(stacked)
    ]
    adapted = fgpt.adapt(params, *trees)
    merged = fgpt.merge(adapted)
    assert not any(isinstance(x, fgpt.Adapted) for _, x in walk(merged))
    assert leaves(merged).keys() == leaves(params).keys()
    close(fgpt.apply(merged, X), fgpt.apply(adapted, X), 1e-4, 1e-5)
    assert (fgpt.apply(adapted, X) - fgpt.apply(params, X)).abs().max() > 0.1


def test_an_adapter_on_a_tied_table_moves_embedding_and_head(gpt: fgpt.GPT):
    adapted = fgpt.adapt(gpt, with_noise(fgpt.lora(gpt, fgpt.key(0), 2, target="wte")))
    table = fgpt.dense(adapted.wte.w)
    close(fgpt.apply(adapted, X), fgpt.apply(replace_at(gpt, {"wte.w": table}), X), 1e-5)
    close(fgpt.embed(X, adapted.wte.w), table[X], 1e-6)
    close(fgpt.logits(adapted, torch.eye(16)), table.T, 1e-6)


# -------------------------------------------------------------------------------------------------- nothing is expanded


def test_the_factored_path_never_merges(gpt: fgpt.GPT, factored: Callable[[], None]):
    adapters = with_noise(fgpt.lora(gpt, fgpt.key(0), 2, target=rf"wte|{LINEARS}"))
    adapted = fgpt.adapt(gpt, adapters)
    fgpt.apply(adapted, X)
    grad(loss_of(gpt))(adapters)
    fgpt.generate(adapted, [[1], [2, 3]], eos_token_id=0, max_new_tokens=3)
    with pytest.raises(AssertionError, match="dense was called"):
        fgpt.merge(adapted)
    factored()
    fgpt.merge(adapted)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("tied table, dora", "dora over ia3")])
@pytest.mark.parametrize("base", ["fp32", "nf4", "int8"])
@pytest.mark.usefixtures("factored")
def test_no_method_merges_on_the_factored_path(base: str, method: str):
    """Two do: the row norms of what is scaled by column, and a head scaled by row, whose loss is one product."""
    *frozen, last = METHODS[method](BASES[base])
    params = fgpt.adapt(BASES[base], *frozen)
    fgpt.apply(fgpt.adapt(params, last), X)
    assert all(torch.isfinite(g).all() for g in leaves(grad(loss_of(params))(last)).values())


WIDE = 2048


@pytest.fixture(scope="module")
def wide() -> dict[str, Any]:
    return {kind: matrix(kind, WIDE, WIDE) for kind in ("fp32", "bf16", "nf4", "int8", "blockwise8")}


def adapter(method: str, w: Any) -> fgpt.Adapters:
    base = {"layer": Linear(w, torch.zeros(WIDE))}
    if method == "ia3":
        return with_noise(fgpt.ia3(base, "layer", "layer"))
    return with_noise((fgpt.dora if method == "dora" else fgpt.lora)(base, fgpt.key(0), 4, target="layer"))


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4", "int8", "blockwise8"])
def test_row_norms_hold_no_second_matrix(wide: dict[str, Any], kind: str):
    lora: Any = adapter("lora", wide[kind])["layer"]
    with LargestTensor() as largest:
        fgpt.dora({"layer": Linear(wide[kind])}, fgpt.key(0), 4, target="layer")
        row_norms(wide[kind], lora.a, lora.b, lora.scale)
        row_norms(fgpt.Adapted(wide[kind], lora.a, lora.b), lora.a, lora.b, lora.scale)
    assert largest.numel <= (8 * WIDE if kind == "fp32" else WIDE * WIDE // 4)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_a_layer_costs_no_matrix(wide: dict[str, Any], method: str):
    """Adapting, forward and backward: nothing new beyond the rows and the adapter's own size."""
    base, adapters = {"layer": Linear(wide["fp32"], torch.ones(WIDE))}, adapter(method, wide["fp32"])
    x = torch.randn(3, WIDE, generator=fgpt.key(1))

    def f(adapters: Any) -> Tensor:
        layer = fgpt.adapt(base, adapters)["layer"]
        return fgpt.linear(x, layer.w, layer.b).square().sum()

    with LargestTensor() as largest:
        grad(f)(adapters)
        fgpt.adapt(base, adapters)
    assert WIDE < largest.numel <= 4 * WIDE


def test_a_stack_of_adapters_on_a_quantized_layer_expands_its_base_alone(wide: dict[str, Any]):
    adapted: Any = {"layer": Linear(wide["nf4"])}
    for method in ("lora", "dora", "ia3"):
        adapted = fgpt.adapt(adapted, adapter(method, wide["nf4"]))
    sizes = []
    for w in (wide["nf4"], adapted["layer"].w):
        with LargestTensor() as largest:
            fgpt.linear(torch.randn(3, WIDE, generator=fgpt.key(1)), w)
        sizes.append(largest.shapes)
    large = [{s for s in shapes if torch.Size(s).numel() >= WIDE * 64} for shapes in sizes]
    assert large[0] == large[1]


# ---------------------------------------------------------------------------------------------------------------- DoRA


EVERY = ("fp32", "bf16", "nf4", "int8", "blockwise8")


@settings(max_examples=60)
@given(st.one_of(weights(*EVERY, columns=False), weights(*EVERY)), st.integers(1, 8), st.integers(0, 9))
def test_row_norms_are_the_norms_of_the_rows(w: Any, rows: int, seed: int):
    """Of a bare matrix and of what lies over it, expanded a few rows at a time."""
    a, b = (torch.randn(*size, generator=fgpt.key(seed)) for size in ((3, IN), (OUT, 3)))
    bottom, columns = w, False
    while isinstance(bottom, fgpt.Adapted):
        bottom, columns = bottom.base, columns or bottom.col is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fgpt.kernels.row_norms.CHUNK", rows * IN)
        for weight in (bottom, w):
            exact = meaning(weight) + 0.7 * b.double() @ a.double()
            got = row_norms(weight, a, b, 0.7)
            assert got.dtype == torch.float32
            rounds = weight is w and columns and bottom.dtype == torch.bfloat16  # W' is formed there, in its dtype
            near(got, exact.norm(dim=-1), 1e-2 if rounds else 1e-5)


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
    base = {"layer": Linear(matrix(kind, OUT, IN), bias)}
    adapters: Any = with_noise(fgpt.dora(base, fgpt.key(0), 3, 5, target="layer"))
    x, u = torch.randn(4, IN, generator=fgpt.key(1)), torch.randn(4, OUT, generator=fgpt.key(2))

    def ours(adapters: Any) -> Tensor:
        layer = fgpt.adapt(base, adapters)["layer"]
        return (u * fgpt.linear(x, layer.w, layer.b).sin()).sum()

    def by_hand(a: Tensor, b: Tensor, m: Tensor, norm: Tensor | None = None) -> Tensor:
        v = meaning(base["layer"].w) + 5 / 3 * b @ a
        norm = v.norm(dim=-1) if norm is None else norm
        y = x.double() @ ((m / norm)[:, None] * v).T + bias.double()
        return (u.double() * y.sin()).sum()

    at: Any = tuple(t.double() for t in leaves(adapters).values())
    norm = (meaning(base["layer"].w) + 5 / 3 * at[1] @ at[0]).norm(dim=-1)
    near(ours(adapters), by_hand(*at))

    def with_constant_norm(a: Tensor, b: Tensor, m: Tensor) -> Tensor:
        return by_hand(a, b, m, norm)

    got, expected = list(leaves(grad(ours)(adapters)).values()), grad(with_constant_norm, argnums=(0, 1, 2))(*at)
    for g, e in zip(got, expected, strict=True):
        near(g, e)
    whole = grad(by_hand, argnums=1)(*at)
    assert (whole - expected[1]).abs().max() > 0.01 * expected[1].abs().max()
    # Forward mode holds it as well: the slope along a direction, and a Hessian's product, are those of that form.
    along, ones = tree_map(torch.ones_like, adapters), tuple(torch.ones_like(t) for t in at)
    near(jvp(ours, (adapters,), (along,))[1], jvp(with_constant_norm, at, ones)[1])
    second = leaves(jvp(grad(ours), (adapters,), (along,))[1]).values()
    for g, e in zip(second, jvp(grad(with_constant_norm, argnums=(0, 1, 2)), at, ones)[1], strict=True):
        near(g, e)


# ---------------------------------------------------------------------------------------------------------------- PEFT


def in_peft(config: Any, seed: int = 0) -> tuple[Any, dict[str, Tensor], Linear]:
    """One linear layer under PEFT, what PEFT trains there (moved from its start), and the layer as ours."""
    plain = nn.Linear(12, 9)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(torch.randn(p.shape, generator=rng))
    layer = Linear(plain.weight.detach().clone(), plain.bias.detach().clone())
    model: Any = peft.get_peft_model(nn.Sequential(OrderedDict(lin=plain)), config)  # pyright: ignore
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.3 * torch.randn(p.shape, generator=rng))
    return model, trained, layer


def agree(model: Any, trained: Sequence[Tensor], layer: Linear, adapters: fgpt.Adapters) -> None:
    """Outputs, and the gradients of what is trained, in the order of the adapters' leaves."""
    x, u = torch.randn(4, 12, generator=fgpt.key(1)), torch.randn(4, 9, generator=fgpt.key(2))

    def ours(adapters: Any) -> tuple[Tensor, Tensor]:
        adapted = fgpt.adapt({"lin": layer}, adapters)["lin"]
        y = fgpt.linear(x, adapted.w, adapted.b)
        return (u * y.sin()).sum(), y

    peft_y = model(x)
    (u * peft_y.sin()).sum().backward()
    grads, y = grad(ours, has_aux=True)(adapters)
    near(y, peft_y.detach())
    assert (y - F.linear(x, layer.w, layer.b)).abs().max() > 0.1  # pyright: ignore
    found = leaves(grads)
    assert len(found) == len(trained)
    for (path, g), t in zip(found.items(), trained, strict=True):
        assert t.grad is not None, path
        near(g, t.grad.view(g.shape))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rs", [False, True])
def test_lora_and_dora_are_pefts_ranked_stable_and_not(dora: bool, rs: bool):
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["lin"], use_dora=dora, use_rslora=rs)
    model, trained, layer = in_peft(config)
    a, b, *m = (trained[name] for name in sorted(trained))  # lora_A, lora_B, lora_magnitude_vector
    lora = fgpt.LoRA(a.detach(), b.detach(), 5.0, rs)
    assert lora.scale == pytest.approx(5 / 3**0.5 if rs else 5 / 3)
    agree(model, [a, b, *m], layer, {"lin": fgpt.DoRA(lora, m[0].detach()) if dora else lora})


@pytest.mark.parametrize("feedforward", [False, True])
def test_ia3_is_pefts(feedforward: bool):
    """PEFT scales what a layer gives, its bias too, or what a feedforward layer takes."""
    chosen = ["lin"] if feedforward else []
    model, trained, layer = in_peft(peft.IA3Config(target_modules=["lin"], feedforward_modules=chosen))
    (scale,) = trained.values()
    l = scale.detach().flatten()  # noqa: E741
    agree(model, [scale], layer, {"lin": fgpt.IA3(col=l) if feedforward else fgpt.IA3(row=l)})


# ------------------------------------------------------------------------------------------------------------- dropout


def fresh_with_dropout(p: float = 0.5, params: fgpt.GPT = PLAIN) -> Any:
    return with_noise(fgpt.lora(params, fgpt.key(0), 4, target=LINEARS, dropout=p))


def test_dropout_needs_a_key():
    """Without one it is off, and so it is in the merged reading."""
    adapters = fresh_with_dropout()
    plain = tree_map(lambda x: x, {p: fgpt.LoRA(x.a, x.b, x.alpha) for p, x in adapters.items()})
    expected = fgpt.apply(fgpt.adapt(PLAIN, plain), X)
    assert torch.equal(fgpt.apply(fgpt.adapt(PLAIN, adapters), X), expected)
    assert torch.equal(fgpt.apply(fgpt.adapt(PLAIN, plain, rng=fgpt.key(0)), X), expected)  # probability 0
    with_key = fgpt.adapt(PLAIN, adapters, rng=fgpt.key(0))
    assert not torch.allclose(fgpt.apply(with_key, X), expected, atol=0.1)
    assert same(fgpt.merge(with_key), fgpt.merge(fgpt.adapt(PLAIN, plain)))


def test_one_key_is_one_mask_and_two_are_two():
    adapters, world = fresh_with_dropout(), torch.get_rng_state()

    def logits(rng: Any) -> Tensor:
        return fgpt.apply(fgpt.adapt(PLAIN, adapters, rng=rng), X)

    rng = fgpt.key(0)
    before = rng.get_state()
    first = logits(rng)
    assert torch.equal(logits(rng), first)
    assert torch.equal(logits(fgpt.seed_tensor(fgpt.key(0))), first)  # a key, or its seed
    assert not torch.allclose(logits(fgpt.key(1)), first, atol=0.1)
    assert torch.equal(rng.get_state(), before)
    assert torch.equal(torch.get_rng_state(), world)


def test_every_path_and_every_tree_has_its_own_mask():
    """Seen through an identity: a layer whose A and B pass its input on."""
    eye = fgpt.LoRA(torch.eye(8), torch.eye(8), 8.0, dropout=0.5)
    params = {name: Linear(torch.zeros(8, 8)) for name in ("q", "k")}
    trees = [{"q": eye, "k": eye}, {"q": eye}]
    adapted = fgpt.adapt(params, *trees, rng=fgpt.key(0))
    outer, inner, other = adapted["q"].w, adapted["q"].w.base, adapted["k"].w  # pyright: ignore
    x = torch.ones(16, 8)
    masks = [fgpt.linear(x, w) for w in (inner, other, replace_at(outer, {"base": torch.zeros(8, 8)}))]
    for i, mask in enumerate(masks):
        assert set(mask.unique().tolist()) == {0.0, 2.0}
        assert not any(torch.equal(mask, masks[j]) for j in range(i))


def test_dropouts_mean_is_no_dropout():
    """And its spread is that of x_i keep_i / (1 - p), summed through B·A."""
    w, a, b = (torch.randn(*s, generator=fgpt.key(i)) for i, s in enumerate([(5, 6), (2, 6), (5, 2)]))
    x, n, p = torch.randn(3, 6, generator=fgpt.key(9)), 4096, 0.3

    def once(seed: Tensor) -> Tensor:
        return fgpt.linear(x, fgpt.Adapted(w, a, b, seed=seed, dropout=p))

    seeds = torch.arange(n)
    out = vmap(once)(seeds)
    close(out[7], once(seeds[7]), 1e-5)
    assert ((out.mean(0) - fgpt.linear(x, fgpt.Adapted(w, a, b))).abs() <= 5 * out.std(0) / n**0.5).all()
    spread = (p / (1 - p) * x.square() @ (b @ a).square().T).sqrt()
    torch.testing.assert_close(out.std(0), spread, atol=0, rtol=0.1)


def test_seeds_are_mapped_over():
    """An ensemble of masks in one pass, and their gradients."""
    adapters, seeds = fresh_with_dropout(), torch.tensor([3, 4, 5])

    def loss(adapters: Any, seed: Tensor) -> Tensor:
        return fgpt.loss(fgpt.adapt(PLAIN, adapters, rng=seed), BATCH)

    got = vmap(loss, in_dims=(None, 0))(adapters, seeds)
    close(got, torch.stack([loss(adapters, s) for s in seeds]), 1e-5)
    assert got.unique().numel() == 3
    grads = vmap(grad(loss), in_dims=(None, 0))(adapters, seeds)
    close(grads, stack_trees([grad(loss)(adapters, s) for s in seeds]), 1e-5)


def test_an_adapted_head_drops_what_its_loss_drops():
    """`linear` for logits and `products` for the loss: one mask."""
    adapted = fgpt.adapt(
        PLAIN, with_noise(fgpt.lora(PLAIN, fgpt.key(0), 4, target="wte", dropout=0.5)), rng=fgpt.key(0)
    )
    logits = fgpt.apply(adapted, X).flatten(0, 1)
    near(fgpt.loss(adapted, BATCH), F.cross_entropy(logits, Y.flatten()))


def test_each_micro_batch_draws_its_own_mask():
    seeds: list[Tensor | None] = []

    def loss(adapters: Any, params: Any, batch: fgpt.Batch, rng: Tensor | None) -> tuple[Tensor, Tensor]:
        seeds.append(rng)
        return step_loss(adapters, params, batch, rng)

    optimizer = fgpt.adamw(1e-2)
    state, step = fgpt.init_state(fresh_with_dropout(), optimizer), make_step(loss, optimizer)
    first, repeated, other, none = (
        step(state, PLAIN, [BATCH] * 3, rng)[0] for rng in (*map(fgpt.key, (0, 0, 1)), None)
    )
    assert same(first, repeated)
    assert not same(first, other)
    assert not same(first, none)
    drawn = [None if s is None else int(s) for s in seeds]
    assert drawn[:3] == drawn[3:6]
    assert len(set(drawn[:3] + drawn[6:9])) == 6
    assert drawn[9:] == [None] * 3


# ------------------------------------------------------------------------------------------------------ half precision


def test_a_half_precision_base_keeps_its_dtype_and_the_adapters_theirs(gpt: fgpt.GPT):
    params, adapters = astype(gpt, torch.bfloat16), with_noise(fgpt.lora(gpt, fgpt.key(0), 2, target=LINEARS))
    assert fgpt.apply(fgpt.adapt(params, adapters), X).dtype == torch.bfloat16
    assert {x.dtype for x in leaves(grad(loss_of(params))(adapters)).values()} == {torch.float32}
    assert same(leaves(fgpt.merge(fgpt.adapt(params, {}))), leaves(params))


@pytest.mark.parametrize("target", [r".*\.b", r".*ln_.*", "wte.*|wpe.*", r"blocks.*\.w", ".*"])
def test_what_is_tuned_over_a_half_precision_base_computes_in_its_dtype(target: str):
    """And is trained in fp32: what is laid there is rounded, the gradient is not."""
    params = BASES["bf16"]
    tuned = fgpt.trainable_leaves(params, target)
    assert torch.equal(fgpt.apply(fgpt.adapt(params, tuned), X), fgpt.apply(params, X))
    grads = leaves(grad(loss_of(params))(tuned))
    assert {g.dtype for g in grads.values()} == {torch.float32}
    assert all(g.abs().max() > 0 for p, g in grads.items() if not p.endswith("k.b"))  # softmax sees no key bias


# --------------------------------------------------------------------------------------------- unions and selectors


def test_lora_and_tuned_leaves_are_one_tree(gpt: fgpt.GPT):
    lora, norms = fgpt.lora(gpt, fgpt.key(0), 2), fgpt.trainable_leaves(gpt, r".*ln_.*")
    both = with_noise(lora | norms, seed=3)
    assert fgpt.num_trainable(both) == fgpt.num_trainable(lora) + 2 * 16 * (2 * 2 + 1)
    expected = fgpt.adapt(replace_at(gpt, {p: both[p] for p in norms}), {p: both[p] for p in lora})
    assert torch.equal(fgpt.apply(fgpt.adapt(gpt, both), X), fgpt.apply(expected, X))
    assert {p for p, g in leaves(grad(loss_of(gpt))(both)).items() if g.abs().max() == 0} == set()


def test_a_lora_lies_on_a_weight_tuned_in_the_same_tree(gpt: fgpt.GPT):
    """Whichever side of the union comes first, neither is silently dropped."""
    lora, full = with_noise(fgpt.lora(gpt, fgpt.key(0), 2)), with_noise(fgpt.trainable_leaves(gpt), seed=5)
    expected = fgpt.apply(fgpt.adapt(gpt, full, lora), X)
    assert torch.equal(fgpt.apply(fgpt.adapt(gpt, lora | full), X), expected)
    assert torch.equal(fgpt.apply(fgpt.adapt(gpt, full | lora), X), expected)


def test_an_ia3_scales_a_bias_tuned_in_the_same_tree(gpt: fgpt.GPT):
    scales, biases = (
        with_noise(fgpt.ia3(gpt, LINEARS, LINEARS)),
        with_noise(fgpt.trainable_leaves(gpt, r".*\.b"), seed=5),
    )
    expected = fgpt.adapt(gpt, biases, scales)
    assert same(fgpt.adapt(gpt, scales | biases), expected)
    layer, row = expected.blocks[0].mlp.up, scales["blocks.0.mlp.up"].row
    assert torch.equal(layer.b, row * biases["blocks.0.mlp.up.b"])  # pyright: ignore


def test_tuning_everything_is_the_model(gpt: fgpt.GPT):
    full = fgpt.trainable_leaves(gpt, ".*")
    assert fgpt.num_trainable(full) == num_elements(gpt)
    assert same(fgpt.adapt(gpt, full), gpt)
    moved = with_noise(full, seed=7)
    assert same(leaves(fgpt.adapt(gpt, moved)), moved)
    assert {x.dtype for x in leaves(fgpt.trainable_leaves(astype(gpt, torch.bfloat16))).values()} == {torch.float32}


B = torch.ones(40, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: fgpt.lora(p, fgpt.key(0), target=r"blocks\.\d+\.attn\.c_attn"),
            r"no path; nearest are blocks\.0\.a",
        ),
        (lambda p: fgpt.lora(p, fgpt.key(0), target="(q"), "not a regular expression"),
        (lambda p: fgpt.trainable_leaves(p, r"ln_f\.weight"), r"no path; nearest are .*ln_f\.w"),
        (lambda p: fgpt.lora(p, fgpt.key(0), rank=17), r"rank 17 on blocks\.0\.attn\.q: expected 1 to 16"),
        (lambda p: fgpt.lora(p, fgpt.key(0), rank=0), "rank 0"),
        (
            lambda p: fgpt.adapt(p, fgpt.lora(tiny(d_model=8), fgpt.key(0), 2)),
            r"adapter at blocks\.0\.attn\.q fits a weight of \[8, 8\], but the base has \[16, 16\]",
        ),
        (lambda p: fgpt.adapt(p, {"ln_f.w": torch.ones(8)}), r"ln_f\.w has shape \[8\], but the base has \[16\]"),
        (lambda p: fgpt.adapt(p, {"ln_g.w": torch.ones(16)}), r"no leaf 'ln_g\.w' to replace"),
        (lambda p: fgpt.adapt(p, fgpt.lora(tiny(n_layer=3), fgpt.key(0), 2)), r"no layer 'blocks\.2\.attn\.q'"),
        (
            lambda p: fgpt.adapt(p, fgpt.lora(fgpt.fuse_qkv(p), fgpt.key(0), 2)),
            r"for a fused base: fuse_qkv\(params\) first",
        ),
        (lambda p: fgpt.adapt(fgpt.fuse_qkv(p), fgpt.lora(p, fgpt.key(0), 2)), r"not fused: do not fuse_qkv\(params\)"),
        (lambda p: fgpt.dora(p, fgpt.key(0), rank=17), r"rank 17 on blocks\.0\.attn\.q: expected 1 to 16"),
        (
            lambda p: fgpt.lora(p, fgpt.key(0), dropout=1.0),
            r"dropout 1\.0: expected a probability from 0 to less than 1",
        ),
        (lambda p: fgpt.lora(p, fgpt.key(0), dropout=-0.1), r"dropout -0\.1"),
        (lambda p: fgpt.ia3(p, rows="wte"), "IA3 on wte: expected a linear layer, got Embedding"),
        (lambda p: fgpt.ia3(p, cols="wpe"), "IA3 on wpe: expected a linear layer, got Embedding"),
        (lambda p: fgpt.ia3(p, rows=r".*ln_1"), "no path; nearest are"),
        (
            lambda p: fgpt.adapt(
                p, tree_map(lambda x: x if x.shape[1] == 16 else x[:, :3], fgpt.lora(p, fgpt.key(0), 4))
            ),
            r"adapter at blocks\.0\.attn\.q has A of rank 4, but B of rank 3",
        ),
        (
            lambda p: fgpt.adapt(
                p, {"blocks.0.attn.q": fgpt.DoRA(fgpt.LoRA(torch.ones(2, 16), torch.ones(16, 2), 1.0), torch.ones(8))}
            ),
            r"DoRA at blocks\.0\.attn\.q has 8 magnitudes, but the base has 16 rows",
        ),
        (
            lambda p: fgpt.adapt(
                p, {"blocks.0.mlp.up": fgpt.DoRA(fgpt.LoRA(torch.ones(2, 8), B, 1.0), torch.ones(40))}
            ),
            r"adapter at blocks\.0\.mlp\.up fits a weight of \[40, 8\], but the base has \[40, 16\]",
        ),
        (
            lambda p: fgpt.adapt(p, {"blocks.0.attn.q": fgpt.IA3(row=torch.ones(8))}),
            r"IA3 at blocks\.0\.attn\.q scales 8 components, but the base has 16",
        ),
        (
            lambda p: fgpt.adapt(p, {"blocks.0.mlp.up": fgpt.IA3(torch.ones(40), torch.ones(40))}),
            r"IA3 at blocks\.0\.mlp\.up scales 40 components, but the base has 16",
        ),
        (lambda p: fgpt.adapt(p, {"blocks.0.ln_1": fgpt.IA3(torch.ones(16))}), r"no layer 'blocks\.0\.ln_1' to adapt"),
        (lambda p: fgpt.adapt(p, fgpt.dora(tiny(n_layer=3), fgpt.key(0), 2)), r"no layer 'blocks\.2\.attn\.q'"),
        (
            lambda p: fgpt.merge(p, base="quantized"),
            "merge with base 'quantized': expected \"dequantized\" or a params tree",
        ),
        (lambda p: fgpt.fuse_qkv(fgpt.adapt(p, fgpt.lora(p, fgpt.key(0), 2))), "fuse the plain base"),
        (lambda p: fgpt.save(fgpt.adapt(p, fgpt.lora(p, fgpt.key(0), 2)), Path("x")), r"merge\(params\) first"),
    ],
)
def test_what_does_not_fit_is_named(make: Callable[[fgpt.GPT], Any], message: str, gpt: fgpt.GPT):
    with pytest.raises(fgpt.InputError, match=message) as caught:
        make(gpt)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- randomness


def test_keys_are_read_and_never_advanced(gpt: fgpt.GPT):
    rng, world = fgpt.key(3), torch.get_rng_state()
    before = rng.get_state()
    fgpt.init(gpt.cfg, rng)
    fgpt.lora(gpt, rng, 2)
    first = fgpt.generate(
        gpt, [[1], [2, 3]], eos_token_id=0, max_new_tokens=8, sampling=fgpt.SamplingParams(temperature=1.0), rng=rng
    )
    assert (
        fgpt.generate(
            gpt, [[1], [2, 3]], eos_token_id=0, max_new_tokens=8, sampling=fgpt.SamplingParams(temperature=1.0), rng=rng
        )
        == first
    )
    assert (
        fgpt.generate(
            gpt,
            [[1], [2, 3]],
            eos_token_id=0,
            max_new_tokens=8,
            sampling=fgpt.SamplingParams(temperature=1.0),
            rng=fgpt.key(4),
        )
        != first
    )
    assert torch.equal(rng.get_state(), before)
    assert torch.equal(torch.get_rng_state(), world)


def test_draws_belong_to_the_key_and_the_path(gpt: fgpt.GPT):
    few: Any = fgpt.lora(gpt, fgpt.key(0), 2)
    more: Any = fgpt.lora(gpt, fgpt.key(0), 2, target=LINEARS)
    assert same(few, {path: more[path] for path in few})  # what else is adapted changes nothing
    other: Any = fgpt.lora(gpt, fgpt.key(1), 2)
    drawn = [x.a for x in more.values() if x.a.shape[1] == 16] + [x.a for x in other.values()]
    assert len({tuple(a.flatten().tolist()) for a in drawn}) == len(drawn)
    assert all(x.a.abs().max() <= 16**-0.5 and x.a.std() > 0.1 for x in few.values())
    assert set(few) == {p for p in weight_matrices(gpt) if re.fullmatch(r"blocks\.\d\.attn\.[qkv]", p)}


def test_adapters_and_params_are_fp32_whatever_the_default_is(gpt: fgpt.GPT):
    torch.set_default_dtype(torch.float64)
    try:
        adapters, params = fgpt.lora(gpt, fgpt.key(0), 2), fgpt.init(gpt.cfg, fgpt.key(0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(adapters, fgpt.lora(gpt, fgpt.key(0), 2))
    assert same(params, fgpt.init(gpt.cfg, fgpt.key(0)))
