"""8-bit AdamW: its error, its purity, its bytes, its training."""

from typing import Any

import pytest
import torch
from builders import close, same, tiny, tokens, with_noise
from builders.adamw8bit import CODED, MIXED_TREE, gradients_of_step
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jvp, vmap

import fgpt
from fgpt.errors import InputError
from fgpt.kernels.bitsandbytes_ops import dynamic_code
from fgpt.kernels.blockwise_8bit import dequantize, quantize
from fgpt.optim import Moment8, adamw, adamw8bit, cosine_schedule
from fgpt.tree import astype, leaves, num_elements, tree_map

LR, DECAY = 1e-2, 0.1


# -------------------------------------------------------------------------------------------------- against the others


@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_fifty_updates_are_close_to_fp32(spread: float):
    schedule = cosine_schedule(LR, 50, warmup_steps=5)
    full, coded = (make(schedule, weight_decay=DECAY) for make in (adamw, adamw8bit))
    a, b, s, t = MIXED_TREE, MIXED_TREE, full.init(MIXED_TREE), coded.init(MIXED_TREE)
    for step in range(50):
        a, s = full.update(gradients_of_step(step, spread), s, a)
        b, t = coded.update(gradients_of_step(step, spread), t, b)
    for name in MIXED_TREE:
        way, difference = (
            (a[name] - MIXED_TREE[name]).square().mean().sqrt(),
            (a[name] - b[name]).square().mean().sqrt(),
        )
        assert difference < 0.05 * way
    assert same({n: a[n] for n in ("small", "b")}, {n: b[n] for n in ("small", "b")})


# ---------------------------------------------------------------------------------------------------------------- laws


def halves(code: Tensor, x: Tensor) -> Tensor:
    """Half the distance between the two values of the code around each of `x`."""
    above = torch.searchsorted(code, x).clamp(1, 255)
    return torch.maximum((code[above] - code[above - 1]) / 2, (x - code[-1]).clamp(min=0) + (code[0] - x).clamp(min=0))


@given(st.integers(1, 1500), st.sampled_from([1e-20, 1e-3, 1e6]), st.floats(0.5, 8), st.booleans(), st.integers(0, 99))
def test_the_error_is_what_the_code_allows(n: int, scale: float, spread: float, signed: bool, seed: int):
    """Half a step of the code; above 1e-4 of the block's largest, half a step of bitsandbytes' 2⁻¹⁵ grid besides."""
    x = torch.randn(n, generator=fgpt.key(seed)).double()
    x = (scale * x.sign() * x.abs() ** spread).float()
    x = x if signed else x.abs()
    codes, absmax = quantize(x, signed)
    got, code = dequantize(codes, absmax, signed), dynamic_code(signed)
    blocks = absmax.repeat_interleave(256)[:n]
    assert absmax.shape == (-(n // -256),)
    assert torch.equal(absmax, torch.stack([b.abs().max() for b in x.split(256)]))
    part, error = x / blocks, (got - x).abs() / blocks
    lost = torch.where(signed | (x <= 0) | (part > code[1]), 0.0, code[1].double())  # positive, so not 0
    allowed = torch.maximum(halves(code, part).double(), lost) + torch.where(part.abs() < 1e-4, 0.0, 2.0**-16)
    assert (error <= allowed + 2e-7).all()
    assert signed or ((got > 0) == (x > 0)).all()


@pytest.mark.parametrize("signed", [True, False])
def test_values_of_the_code_and_zeros_are_exact(signed: bool):
    x = gradients_of_step(0)["odd"].abs()
    decoded = dequantize(*quantize(x, signed), signed)
    assert torch.equal(dequantize(*quantize(decoded, signed), signed), decoded)
    x = torch.zeros(600)
    assert torch.equal(dequantize(*quantize(x, signed), signed), x)
    x[5] = 7.0
    assert torch.equal(dequantize(*quantize(x, signed), signed), x)


def test_a_weight_without_a_gradient_stays_and_a_small_one_makes_no_leap():
    """Beside large gradients: never any, and a tiny one followed by none, which bitsandbytes on CUDA answers by m̂/ε."""
    start = torch.zeros(4096)
    optimizer = adamw8bit(LR)
    params, state = {"w": start}, optimizer.init({"w": start})
    for step in range(30):
        g = torch.randn(4096, generator=fgpt.key(step))
        g[::16] = 0.0
        g[1::16] = 1e-4 if step == 0 else 0.0
        params, state = optimizer.update({"w": g}, state, params)
    assert not params["w"][::16].any()
    assert 0 < params["w"][1::16].abs().max() < 10 * LR


def test_an_update_is_pure():
    optimizer, rng = adamw8bit(LR, weight_decay=DECAY), torch.get_rng_state()
    params, state = optimizer.update(gradients_of_step(0), optimizer.init(MIXED_TREE), MIXED_TREE)
    inputs = (gradients_of_step(1), state, params)
    before = tree_map(torch.clone, inputs)
    first, second = optimizer.update(*inputs), optimizer.update(*inputs)
    assert same(before, inputs)
    assert same(first, second)
    assert not same(first[1], state)
    assert torch.equal(torch.get_rng_state(), rng)
    storages = {x.untyped_storage().data_ptr() for x in leaves(first).values()}
    assert storages.isdisjoint(x.untyped_storage().data_ptr() for x in leaves(inputs).values())


def state_bytes(tree: Any) -> int:
    return sum(x.numel() * x.element_size() for x in leaves(tree).values())


def test_bytes_a_parameter():
    large, small = {"w": torch.zeros(768, 769), "b": torch.zeros(4096)}, {"w": torch.zeros(4095)}
    state = adamw8bit(LR).init(large)
    assert state_bytes((state.mu, state.nu)) <= 2.04 * num_elements(large)
    assert state_bytes(adamw8bit(LR).init(small)) == 8 * 4095 + 8
    assert state_bytes(adamw8bit(LR, min_8bit_size=0).init(small)) < 2.1 * 4095


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_params_keep_their_dtype(dtype: torch.dtype):
    tree, grads = astype(MIXED_TREE, dtype), astype(gradients_of_step(3), dtype)
    optimizer = adamw8bit(LR, min_8bit_size=0)
    params, _ = optimizer.update(grads, optimizer.init(tree), tree)
    assert {x.dtype for x in params.values()} == {dtype}
    expected, _ = adamw(LR).update(gradients_of_step(3), adamw(LR).init(MIXED_TREE), MIXED_TREE)
    close(astype(params, torch.float32), expected, 2 * LR if dtype == torch.bfloat16 else 1e-5)


# --------------------------------------------------------------------------------------------------------------- steps


GPT = tiny(n_layer=1)
ADAPTERS: Any = with_noise(fgpt.lora(GPT, fgpt.key(0), 2), seed=1)
BATCH = fgpt.Batch(tokens(31, 6, 7), tokens(31, 6, 7, seed=1), torch.ones(6, 7))


def objective(adapters: Any, params: Any, batch: fgpt.Batch, rng: Any) -> tuple[Tensor, Tensor]:
    return fgpt.nll(fgpt.adapt(params, adapters), batch)


def test_a_lora_trains_as_well_under_make_step():
    schedule, losses = cosine_schedule(1e-2, 40, warmup_steps=4), {}
    for optimizer in (adamw(schedule, weight_decay=DECAY), adamw8bit(schedule, weight_decay=DECAY, min_8bit_size=0)):
        step, state, losses[optimizer] = fgpt.make_step(objective, optimizer), fgpt.init_state(ADAPTERS, optimizer), []
        for _ in range(40):
            state, metrics = step(state, GPT, [BATCH], None)
            losses[optimizer].append(metrics.loss.item())
        assert state.opt_state.count == 40
    full, coded = losses.values()
    assert isinstance(state.opt_state.mu["blocks.0.attn.q"].a, Moment8)
    assert coded[-1] < coded[0] - 0.3
    assert abs(coded[-1] - full[-1]) < 0.02 * (full[0] - full[-1])


def test_a_schedule_is_followed():
    """The first update is lr · sign(g): at the warmup's first step, and with lr a tensor."""
    optimizer = adamw8bit(cosine_schedule(1e-2, 10, warmup_steps=4))
    params, state = optimizer.update(gradients_of_step(1), optimizer.init(MIXED_TREE), MIXED_TREE)
    moves = {
        name: ((MIXED_TREE[name] - params[name]) / gradients_of_step(1)[name].sign()).median() for name in MIXED_TREE
    }
    close(moves, {name: torch.tensor(1e-2 / 4) for name in MIXED_TREE}, 1e-6)
    assert state.count.dtype == torch.int64


def test_vmapped_updates_are_each_ones_own():
    """Three models at once, the learning rate too: blocks never reach from one into the next, 67 · 71 or not."""
    rates = torch.tensor([1e-3, 1e-2, 1e-1])

    def twice(params: Any, first: Any, second: Any, rate: Tensor) -> Any:
        optimizer = adamw8bit(lambda step: rate)
        new, state = optimizer.update(first, optimizer.init(params), params)
        return optimizer.update(second, state, new)

    many = [
        tree_map(lambda x, i=i: x * (i + 1.0), (MIXED_TREE, gradients_of_step(1), gradients_of_step(2)))
        for i in range(3)
    ]
    together = vmap(twice)(*tree_map(lambda *x: torch.stack(x), *many), rates)
    for i, (trees, rate) in enumerate(zip(many, rates, strict=True)):
        alone, storages = twice(*trees, rate), tree_map(lambda x, i=i: x[i], together)
        close(storages[0], alone[0], 1e-6)
        assert same({n: storages[1].mu[n] for n in CODED}, {n: alone[1].mu[n] for n in CODED})
        assert same({n: storages[1].nu[n] for n in CODED}, {n: alone[1].nu[n] for n in CODED})


def test_gradients_pass_through_one_update_and_say_so_at_two():
    tree, first, second = {"w": MIXED_TREE["w"]}, {"w": gradients_of_step(1)["w"]}, {"w": gradients_of_step(2)["w"]}

    def after(updates: int, optimizer: fgpt.Optimizer, scale: Tensor) -> Tensor:
        params, state = tree, optimizer.init(tree)
        for g in (first, second)[:updates]:
            params, state = optimizer.update(tree_map(lambda x: x * scale + scale, g), state, params)
        return params["w"].square().sum()

    one = torch.tensor(1.0)
    expected = grad(lambda s: after(1, adamw(LR), s))(one)
    close(grad(lambda s: after(1, adamw8bit(LR), s))(one), expected, 1e-5, 1e-5)
    with pytest.raises(InputError, match=r"no derivative.*fgpt\.adamw"):
        grad(lambda s: after(2, adamw8bit(LR), s))(one)
    with pytest.raises(InputError, match="no derivative"):
        jvp(lambda s: after(2, adamw8bit(LR), s), (one,), (one,))


@pytest.mark.parametrize("make", [adamw, adamw8bit])
def test_a_pattern_of_decay_is_read_at_once(make: Any):
    with pytest.raises(InputError, match="not a regular expression"):
        make(LR, decay="(")
