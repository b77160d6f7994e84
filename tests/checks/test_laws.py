"""The doctor's laws hold where nothing is wrong."""

import pytest
import torch
from builders import same, tokens
from builders.checks import FAMILIES, METHODS, PACKED, doctor_batch, doctor_model, failed_checks
from hypothesis import given, settings
from hypothesis import strategies as st

import fgpt
from fgpt.checks.context import max_or_nan, max_rel_diff, perturb
from fgpt.tree import leaves

BASES = ("fp32", "bf16", "nf4", "int8", "blockwise8")


lengths = st.lists(st.lists(st.integers(4, 8), min_size=1, max_size=3).map(tuple), min_size=1, max_size=3)


@pytest.mark.slow
@given(st.sampled_from(list(FAMILIES)), st.sampled_from(BASES), st.sampled_from(list(METHODS)), lengths)
@settings(max_examples=8)
def test_the_laws_hold(family: str, base: str, method: str, rows: list[tuple[int, ...]]):
    params = doctor_model(family, base, 2)
    broken, unasked = failed_checks(params, METHODS[method](params), doctor_batch(*rows))
    alone = {"batch composition", "batch size", "accumulation"} if len(rows) == 1 else set()
    packed = set() if any(len(row) > 1 for row in rows) else {"packing"}
    assert not broken
    assert unasked == alone | packed | ({"merge"} if method in ("ln", "full") else set())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_laws_hold_of_a_classifier(family: str):
    params = fgpt.with_classification_head(doctor_model(family), 3, fgpt.key(0))
    adapters = fgpt.lora(params, fgpt.key(1), 4) | fgpt.trainable_leaves(params, r"head\..*")
    assert failed_checks(params, adapters, doctor_batch((7, 9), (16,), label=2)) == (set(), set())


def test_the_laws_hold_where_rows_fill_the_context_and_of_a_fused_base():
    params = fgpt.fuse_qkv(doctor_model())
    adapters = fgpt.lora(params, fgpt.key(0), 4, target=r".*qkv")
    assert failed_checks(params, adapters, doctor_batch((24,), (11, 13))) == (set(), set())


def test_what_cannot_be_asked_is_not_passed_in_silence():
    params, x = doctor_model(), tokens(31, 9)
    one = fgpt.Batch(x[:-1], x[1:], torch.ones(8))  # a row without a batch around it
    rows = {"batch composition", "batch size", "accumulation", "packing"}
    assert failed_checks(params, fgpt.trainable_leaves(params, r".*ln_.*"), one) == (set(), rows | {"merge"})
    trained = {"accumulation", "gradient flow", "first step", "determinism", "save and load", "merge"}
    assert failed_checks(params, {}, PACKED) == (set(), trained)
    noise = next(f for f in fgpt.run_checks(params, {}, PACKED) if f.check == "merge")
    assert (noise.error, noise.holds, noise.note) == (None, None, "no adapters")


@pytest.mark.slow
def test_it_leaves_everything_as_it_was():
    params = doctor_model()
    adapters, before = METHODS["lora"](params), leaves(params)
    copies = {path: x.clone() for path, x in before.items()}
    first = fgpt.run_checks(params, adapters, PACKED)
    assert same(copies, before)
    assert torch.is_grad_enabled()
    assert fgpt.run_checks(params, adapters, PACKED) == first


def test_the_point_it_asks_at_is_near_and_nothing_special():
    params = doctor_model()
    adapters = METHODS["dora"](params) | METHODS["ln"](params)
    for path, x in leaves(perturb(adapters)).items():
        was = leaves(adapters)[path]
        assert x.ne(was).all() or x.ne(was).float().mean() > 0.9, path
        assert (x - was).square().mean().sqrt() < 0.06 * was.square().mean().sqrt().clamp(min=0.5)
    assert same(perturb(adapters), perturb(adapters))


def test_a_margin_that_is_no_number_does_not_hold():
    assert fgpt.CheckResult("", "", max_or_nan([0.0, float("nan"), 1.0]), 2.0).holds is False
    assert max_rel_diff(torch.zeros(2), torch.tensor([0.0, 1.0])) > 1
    assert max_rel_diff(torch.tensor([2.0, -4.0]), torch.tensor([2.0, -3.0])) == 0.25
