"""Merged and factored are one function; the factored path forms no merged matrix."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import close, same, tiny, tokens, with_noise
from builders.adapters import BASES, BATCH, FRESH, LINEARS, PLAIN, assert_near, loss_of
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad
from torch.nn import functional as F

import fgpt
from fgpt.kernels.quantized_linear import QUANTIZED, dequantize
from fgpt.tree import leaves, replace_at, walk

X, Y = tokens(31, 2, 9), tokens(31, 2, 9, seed=1)


# ------------------------------------------------------------------------------------------------- merged and factored


def adapted_over(
    outer: Callable[[Any], fgpt.Adapters], inner: Callable[[Any], fgpt.Adapters]
) -> Callable[[Any], list[Any]]:
    """Two trees, the outer made for the base under the inner."""

    def make(p: fgpt.GPT) -> list[Any]:
        first = with_noise(inner(p), seed=1)
        return [first, with_noise(outer(fgpt.adapt(p, first)), seed=2)]

    return make


def one(make: Callable[[fgpt.GPT], fgpt.Adapters]) -> Callable[[fgpt.GPT], list[Any]]:
    return lambda p: [with_noise(make(p), seed=1)]


ATTN, MLP = r"blocks\..*\.attn\.\w", r"blocks\..*\.mlp\.\w+"
ADAPTER_KINDS: dict[str, Callable[[fgpt.GPT], list[Any]]] = {
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
        f"{outer} over {inner}": adapted_over(FRESH[outer], FRESH[inner])
        for outer in ("lora", "dora", "ia3")
        for inner in ("lora", "dora", "ia3")
    },
    "tied table": one(lambda p: fgpt.lora(p, fgpt.key(0), 4, target="wte|wpe")),
    "tied table, dora": one(lambda p: fgpt.dora(p, fgpt.key(0), 4, target="wte")),
}


@pytest.fixture
def exact_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 products without the rounding of their input, which the laws above cover."""
    monkeypatch.setattr(
        "fgpt.kernels.quantized_linear.quantized_linear", lambda x, w: F.linear(x, dequantize(w, x.dtype))
    )


@pytest.mark.usefixtures("exact_int8")
@pytest.mark.parametrize("method", ADAPTER_KINDS)
@pytest.mark.parametrize("base", ["fp32", "nf4", "int8", "blockwise8"])
def test_merged_is_factored(base: str, method: str):
    params = BASES[base]
    adapted = fgpt.adapt(params, *ADAPTER_KINDS[method](params))
    merged = fgpt.merge(adapted, base=None if base == "fp32" else "dequantized")
    assert not any(isinstance(x, (fgpt.Adapted, *QUANTIZED)) for _, x in walk(merged))
    assert {p: x.shape for p, x in leaves(merged).items()} == {p: x.shape for p, x in leaves(PLAIN).items()}
    assert_near(fgpt.apply(merged, X), fgpt.apply(adapted, X))
    assert (fgpt.apply(merged, X) - fgpt.apply(params, X)).abs().max() > 0.1
    assert_near(fgpt.loss(merged, BATCH), fgpt.loss(adapted, BATCH))


@pytest.mark.parametrize("method", [m for m in ADAPTER_KINDS if "dora" not in m])
def test_merging_onto_the_original_is_adapting_it(method: str):
    """Whatever the base was quantized to; but for DoRA, whose row scales were those of the quantized rows."""
    for base in ("nf4", "int8"):
        trees = ADAPTER_KINDS[method](BASES[base])
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
        assert_near(fgpt.apply(fgpt.merge(adapted), X), fgpt.apply(adapted, X))
        assert_near(fgpt.loss(fgpt.merge(adapted), BATCH), fgpt.loss(adapted, BATCH))
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


@pytest.mark.parametrize("method", [m for m in ADAPTER_KINDS if m not in ("tied table, dora", "dora over ia3")])
@pytest.mark.parametrize("base", ["fp32", "nf4", "int8"])
@pytest.mark.usefixtures("factored")
def test_no_method_merges_on_the_factored_path(base: str, method: str):
    """Two do: the row norms of what is scaled by column, and a head scaled by row, whose loss is one product."""
    *frozen, last = ADAPTER_KINDS[method](BASES[base])
    params = fgpt.adapt(BASES[base], *frozen)
    fgpt.apply(fgpt.adapt(params, last), X)
    assert all(torch.isfinite(g).all() for g in leaves(grad(loss_of(params))(last)).values())
