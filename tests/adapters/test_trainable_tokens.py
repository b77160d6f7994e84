"""Trainable tokens: what they mean, that they begin as nothing, and that they compose as every adapter does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import close, same, tiny, tokens, with_noise
from builders.peft_adapters import assert_adapters_identical
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

import fgpt
from fgpt.errors import InputError
from fgpt.tree import astype, leaves, tree_map

X = tokens(31, 2, 9)
BATCH = fgpt.Batch(X, tokens(31, 2, 9, seed=1), torch.rand(2, 9, generator=fgpt.key(0)))
IDS = (3, 30, 7)
BASES: dict[str, Any] = {
    "fp32": lambda p: p,
    "fp64": lambda p: astype(p, torch.float64),
    "bf16": lambda p: astype(p, torch.bfloat16),
    **{x: lambda p, x=x: fgpt.quantize(p, x, target=r"blocks\..*|wte|head") for x in ("nf4", "int8", "blockwise8")},
}


def base(tied: bool = True, on: str = "fp32") -> fgpt.GPT:
    return BASES[on](tiny(d_model=64, d_mlp=64, tie_word_embeddings=tied))


def with_rows(params: fgpt.GPT, adapters: Any) -> fgpt.GPT:
    """The definition: tables with other rows."""
    tables: dict[str, Any] = {}
    for path, x in adapters.items():
        table = fgpt.dense({"wte": params.wte, "head": params.head or params.wte}[path].w).clone()
        table[list(x.ids)] = x.rows.to(table.dtype)
        tables[f"{path}.w"] = table
    return fgpt.adapt(fgpt.merge(params, "dequantized"), tables)


@pytest.mark.parametrize("on", BASES)
@pytest.mark.parametrize("tied", [True, False])
def test_they_begin_as_the_base_to_the_bit(tied: bool, on: str):
    params = base(tied, on)
    adapters = fgpt.trainable_tokens(params, IDS)
    assert list(adapters) == ["wte"] + ["head"] * (not tied)
    assert torch.equal(fgpt.apply(fgpt.adapt(params, adapters), X), fgpt.apply(params, X))
    assert {x.dtype for x in leaves(adapters).values()} == {torch.float64 if on == "fp64" else torch.float32}


@given(ids=st.lists(st.integers(0, 30), min_size=1, max_size=31, unique=True), tied=st.booleans())
def test_every_reading_is_that_of_a_table_with_other_rows(ids: list[int], tied: bool):
    params = astype(base(tied), torch.float64)
    adapters = with_noise(fgpt.trainable_tokens(params, ids))
    adapted, expected = fgpt.adapt(params, adapters), with_rows(params, adapters)
    others = [i for i in range(31) if i not in ids]
    close(fgpt.dense(adapted.wte.w), expected.wte.w, 1e-12)
    assert torch.equal(fgpt.dense(adapted.wte.w)[others], params.wte.w[others])
    close(fgpt.embed(X, adapted.wte.w), expected.wte.w[X], 1e-12)
    close(fgpt.apply(adapted, X), fgpt.apply(expected, X), 1e-9)
    close(fgpt.apply(fgpt.merge(adapted), X), fgpt.apply(expected, X), 1e-9)
    close(fgpt.loss(adapted, BATCH), fgpt.loss(expected, BATCH), 1e-9)


@pytest.mark.parametrize("on", ["nf4", "int8", "blockwise8"])
def test_over_a_quantized_table(on: str):
    params = base(True, on)
    adapters = with_noise(fgpt.trainable_tokens(params, IDS))
    adapted, expected = fgpt.adapt(params, adapters), with_rows(params, adapters)
    close(fgpt.embed(X, adapted.wte.w), expected.wte.w[X], 1e-6)
    close(fgpt.dense(adapted.wte.w), expected.wte.w, 1e-6)
    close(fgpt.apply(fgpt.merge(adapted, "dequantized"), X), fgpt.apply(expected, X), 1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_the_rows_of_the_gradient_of_the_tables(tied: bool):
    params = astype(base(tied), torch.float64)
    adapters, v = (with_noise(fgpt.trainable_tokens(params, IDS), seed=i) for i in (0, 1))
    tables = {f"{path}.w": w for path, w in [("wte", with_rows(params, adapters).wte.w)]}
    if not tied:
        tables["head.w"] = with_rows(params, adapters).head.w  # pyright: ignore

    def loss(a: Any) -> torch.Tensor:
        return fgpt.loss(fgpt.adapt(params, a), BATCH)

    def whole(rows: Any) -> torch.Tensor:
        return loss({f"{p}.w": tables[f"{p}.w"].index_copy(0, torch.tensor(IDS), x.rows) for p, x in rows.items()})

    close(grad(loss)(adapters), grad(whole)(adapters), 1e-10)
    for first, second in zip(jvp(grad(loss), (adapters,), (v,)), jvp(grad(whole), (adapters,), (v,)), strict=True):
        close(first, second, 1e-9)


def test_they_compose_with_lora_by_union_and_lie_over_a_lora_of_the_table():
    params = base()
    lora = with_noise(fgpt.lora(params, fgpt.key(0), 2))
    rows = with_noise(fgpt.trainable_tokens(params, IDS))
    union = fgpt.apply(fgpt.adapt(params, lora | rows), X)
    close(union, fgpt.apply(fgpt.adapt(with_rows(params, rows), lora), X), 1e-4)
    table = with_noise(fgpt.lora(params, fgpt.key(0), 2, target="wte"))
    both = fgpt.dense(fgpt.adapt(params, table, rows).wte.w)
    close(both[list(IDS)], rows["wte"].rows, 1e-5)
    assert torch.equal(both[0], fgpt.dense(fgpt.adapt(params, table).wte.w)[0])


def test_a_stack_gives_each_member_its_own_rows():
    params = base(False)
    members = [with_noise(fgpt.lora(params, fgpt.key(i), 2) | fgpt.trainable_tokens(params, IDS)) for i in range(3)]
    stacked = fgpt.stack_adapters(members)
    alone = torch.stack([fgpt.apply(fgpt.adapt(params, a), X) for a in members])
    close(vmap(lambda a: fgpt.apply(fgpt.adapt(params, a), X))(stacked), alone, 1e-4)
    assert all(map(same, fgpt.unstack_adapters(stacked), members))
    with pytest.raises(InputError, match="wte are of different kinds or settings"):
        fgpt.stack_adapters([fgpt.trainable_tokens(params, [1]), fgpt.trainable_tokens(params, [2])])


def test_files_keep_them_bit_for_bit(tmp_path: Path):
    params = base(False)
    adapters = with_noise(fgpt.lora(params, fgpt.key(0), 2) | fgpt.trainable_tokens(params, IDS))
    fgpt.save_adapters(adapters, tmp_path / "a.safetensors")
    assert_adapters_identical(fgpt.load_adapters(tmp_path / "a.safetensors", params), adapters)
    assert fgpt.num_trainable(fgpt.trainable_tokens(params, IDS)) == 2 * 3 * 64


def test_a_file_whose_ids_do_not_fit_is_refused(tmp_path: Path):
    fgpt.save_adapters(fgpt.trainable_tokens(base(), [30]), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="token 30 has no row at wte: expected ids from 0 to 29"):
        fgpt.load_adapters(tmp_path / "a.safetensors", tiny(d_model=64, d_mlp=64, vocab_size=30))


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([], "no tokens to train at wte"),
        ([31], "token 31 has no row at wte: expected ids from 0 to 30"),
        ([-1], "token -1 has no row"),
        ([4, 5, 4], "token 4 is given twice"),
    ],
)
def test_wrong_ids(ids: list[int], error: str):
    with pytest.raises(InputError, match=error):
        fgpt.trainable_tokens(base(), ids)


def test_rows_of_another_size_are_refused():
    adapters = tree_map(lambda x: x[:, :5], fgpt.trainable_tokens(base(), IDS))
    with pytest.raises(InputError, match=r"at wte have rows of \[3, 5\]; expected \[3, 64\]"):
        fgpt.adapt(base(), adapters)
