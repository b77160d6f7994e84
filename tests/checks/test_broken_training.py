"""A training step or a file that is broken: the doctor says which law fails."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders.checks import METHODS, PACKED, Patch, doctor_batch, doctor_model, failed_checks, faulty_checks

import fgpt
from fgpt.tree import astype, tree_map
from fgpt.weights import Adapted


@pytest.mark.parametrize("base", ["fp32", "bf16", "nf4"])
def test_a_merge_that_forgets_the_strength(patch: Patch, base: str):
    def weak(dense: Any) -> Any:
        return lambda w: dense(replace(w, scale=1.0) if isinstance(w, Adapted) else w)

    patch("fgpt.adapters", "dense", weak)
    params = doctor_model(base=base)
    adapters = fgpt.lora(params, fgpt.key(0), 4, alpha=32, target=r"blocks\..*\.(q|v|up|down)")
    assert failed_checks(params, adapters, PACKED)[0] == {"merge"}


def test_accumulation_by_the_mean_of_means(patch: Patch):
    def averaging(make_step: Any) -> Any:
        def make_wrong(*arguments: Any, **options: Any) -> Any:
            step = make_step(*arguments, **options)

            def wrong(state: Any, frozen: Any, batches: Any, rng: Any) -> Any:
                states = [step(state, frozen, [b], rng) for b in batches]
                mean = fgpt.tree.tree_map(lambda *x: torch.stack(x).mean(0), *(s.trainable for s, _ in states))
                return replace(states[0][0], trainable=mean), states[0][1]

            return lambda state, frozen, batches, rng: (step if len(batches) == 1 else wrong)(
                state, frozen, batches, rng
            )

        return make_wrong

    patch("fgpt.checks.context", "make_step", averaging)
    for rows in (PACKED, doctor_batch((8,), (8,))):  # rows alike have means alike, but for what they count
        assert faulty_checks(rows) == {"accumulation"}


def test_a_leaf_that_has_no_gradient_is_named(patch: Patch):
    patch("fgpt.model.forward", "norm", lambda norm: lambda x, p, eps: norm(x, replace(p, b=p.b.detach()), eps))
    params = doctor_model()
    found = fgpt.run_checks(params, METHODS["lora and ln"](params), PACKED)
    (silent,) = (x for x in found if x.holds is False)
    assert (silent.check, silent.error) == ("gradient flow", 3.0)
    assert "blocks.0.ln_1.b" in silent.note


def test_a_rate_that_is_lost_in_rounding():
    params = doctor_model()
    adapters = astype(fgpt.trainable_leaves(params, r".*ln_.*\.w"), torch.bfloat16)
    assert failed_checks(params, adapters, PACKED, lr=1e-5)[0] == {"first step"}
    assert not failed_checks(params, adapters, PACKED, lr=1e-2)[0]


def test_an_optimizer_that_leaves_one_out(patch: Patch):
    def partial(adamw: Any) -> Any:
        def make_wrong(lr: float) -> Any:
            whole = adamw(lr)

            def update(grads: Any, state: Any, params: Any) -> Any:
                new, after = whole.update(grads, state, params)
                return new | {"ln_f.w": params["ln_f.w"]}, after

            return fgpt.Optimizer(whole.init, update)

        return make_wrong

    patch("fgpt.checks.context", "adamw", partial)
    assert faulty_checks() == {"first step"}


def test_a_step_that_draws_from_somewhere_else(patch: Patch):
    count = itertools.count()

    def drifting(nll: Any) -> Any:
        def wrong(params: Any, batch: Any, **options: Any) -> Any:
            total, weight = nll(params, batch, **options)
            return total * (1 + 2e-7 * next(count)), weight

        return wrong

    patch("fgpt.checks.context", "nll", drifting)
    assert faulty_checks() == {"determinism"}


@pytest.mark.parametrize(("noise", "faults"), [(2e-7, set()), (1e-3, {"determinism"}), (float("nan"), {"determinism"})])
@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_where_sums_have_no_order_a_step_is_compared_up_to_rounding(
    patch: Patch, base: str, noise: float, faults: set[str]
):
    """As on a GPU: the second gradient differs from the first by rounding, or by more."""
    count = itertools.count()

    def drifting(make_step: Any) -> Any:
        def make_noisy(loss: Any, optimizer: Any, **options: Any) -> Any:
            def update(grads: Any, state: Any, params: Any) -> Any:
                i = next(count) if optimizer.update.__module__ == "fgpt.optim" else 0
                noisy = tree_map(lambda x: x + i * noise * x.norm() * torch.ones_like(x), grads)
                return optimizer.update(noisy if i else grads, state, params)

            return make_step(loss, fgpt.Optimizer(optimizer.init, update), **options)

        return make_noisy

    patch("fgpt.checks.context", "make_step", drifting)
    patch("fgpt.checks.training", "bitwise_reproducible", lambda reproducible: lambda device: False)
    assert faulty_checks(base=base) == faults


def test_a_file_that_rounds(patch: Patch):
    def short(write: Any) -> Any:
        return lambda path, tensors, about: write(path, {k: x.bfloat16().float() for k, x in tensors.items()}, about)

    patch("fgpt.io.serialization", "write_tensors", short)
    assert faulty_checks() == {"save and load"}


def test_a_peft_folder_that_forgets_alpha(patch: Patch):
    def weak(load: Any) -> Any:
        return lambda *arguments: {path: replace(x, alpha=1.0) for path, x in load(*arguments).items()}

    patch("fgpt.checks.persistence", "load_peft", weak)
    assert faulty_checks(method="lora") == {"save and load"}
    params = doctor_model()
    partly = METHODS["lora"](params) | fgpt.trainable_leaves(
        params, r"blocks\.0\.attn\.q\.b"
    )  # which PEFT does not hold
    assert not failed_checks(params, partly, PACKED)[0]


def test_a_base_that_is_written_to(patch: Patch):
    done: list[bool] = []

    def careless(nll: Any) -> Any:
        def wrong(params: Any, batch: Any, **options: Any) -> Any:
            if not done:  # which a softmax takes off again, so that no other law can tell
                params.blocks[0].attn.k.b.add_(1.0)
                done.append(True)
            return nll(params, batch, **options)

        return wrong

    patch("fgpt.checks.context", "nll", careless)
    params = doctor_model()
    (finding,) = (x for x in fgpt.run_checks(params, METHODS["lora"](params), PACKED) if x.holds is False)
    assert (finding.check, finding.error) == ("frozen base", 1.0)
    assert "base.blocks.0.attn.k.b" in finding.note
