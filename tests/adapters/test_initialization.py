"""Initializations of LoRA: pissa, olora and lora_ga leave the model what it is, and begin where the papers say."""

from typing import Any

import numpy as np
import pytest
import torch
from builders import close, same, tiny
from builders.adapters import three_steps
from builders.initialized import BATCH, CHANGE_THE_BASE, FAMILIES, TOKENS, base, batch_loss, weight_at
from hypothesis import given
from hypothesis import strategies as st
from torch._C._functorch import is_gradtrackingtensor  # pyright: ignore
from torch.func import grad, jvp, vmap

import fgpt
from fgpt.model import Linear
from fgpt.tree import astype, leaves, replace_at, tree_map


def layers(*matrices: torch.Tensor) -> Any:
    return {f"layer{i}": Linear(w) for i, w in enumerate(matrices)}


def random_matrix(seed: int, out: int, inp: int) -> torch.Tensor:
    return torch.randn(out, inp, generator=fgpt.key(seed), dtype=torch.float64)


# ----------------------------------------------------------------------------------------------- the model stays itself


@pytest.mark.parametrize("method", CHANGE_THE_BASE)
@pytest.mark.parametrize("family", FAMILIES)
def test_base_and_adapters_mean_the_base_of_before(family: str, method: str) -> None:
    before = astype(base(family), torch.float64)
    params, adapters = CHANGE_THE_BASE[method](before, rank=3, alpha=5)
    assert adapters.keys() == fgpt.lora(before, fgpt.key(0), rank=3).keys()
    for path, w in leaves(fgpt.merge(fgpt.adapt(params, adapters))).items():
        torch.testing.assert_close(w, leaves(before)[path], rtol=0, atol=1e-12)
    for path in adapters:
        assert (weight_at(params, path) - weight_at(before, path)).abs().max() > 1e-3
    changed = {path for path, w in leaves(params).items() if not torch.equal(w, leaves(before)[path])}
    assert changed == {f"{path}.w" for path in adapters}


@pytest.mark.parametrize("method", CHANGE_THE_BASE)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_the_loss_of_step_0_stay_and_training_lowers_it(family: str, method: str) -> None:
    before = base(family)
    params, adapters = CHANGE_THE_BASE[method](before, rank=3)
    close(fgpt.functional_call(fgpt.apply, (params, adapters), TOKENS), fgpt.apply(before, TOKENS), 1e-4)
    _, losses = three_steps(params, adapters, BATCH)
    assert losses[0] == pytest.approx(float(batch_loss(before)), rel=1e-5)
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("method", CHANGE_THE_BASE)
def test_a_bf16_base_keeps_its_dtype_and_loses_what_its_rounding_loses(method: str) -> None:
    before = astype(tiny(), torch.bfloat16)
    params, adapters = CHANGE_THE_BASE[method](before, rank=3)
    for path, x in adapters.items():
        w: torch.Tensor = weight_at(params, path)
        assert w.dtype == torch.bfloat16
        assert x.a.dtype == x.b.dtype == torch.float32
        error = w.double() + x.scale * x.b.double() @ x.a.double() - weight_at(before, path).double()
        assert bool((error.abs() <= 2**-8 * w.double().abs() + 1e-6).all())


def test_calls_with_other_targets_and_ranks_follow_one_another() -> None:
    before = tiny()
    of_q: Any
    of_v: Any
    params, of_q = fgpt.pissa(before, rank=2, target=r".*\.q")
    params, of_v = fgpt.olora(params, rank=4, target=r".*\.v")
    merged = fgpt.merge(fgpt.adapt(params, of_q | of_v))
    close(merged, before, 1e-6)
    assert {len(x.a) for x in (of_q | of_v).values()} == {2, 4}


@pytest.mark.parametrize("method", CHANGE_THE_BASE)
def test_the_difference_from_the_initial_adapters_lies_over_the_original_base(method: str) -> None:
    before = base("llama")
    params, initial = CHANGE_THE_BASE[method](before, rank=3)
    rng = torch.Generator().manual_seed(1)
    trained = tree_map(lambda x: x + 0.1 * torch.randn(x.shape, generator=rng), initial)
    difference: Any = fgpt.combine(params, [trained, initial], weights=[1, -1])
    assert {len(x.a) for x in difference.values()} == {6}
    logits = fgpt.functional_call(fgpt.apply, (before, difference), TOKENS)
    close(logits, fgpt.functional_call(fgpt.apply, (params, trained), TOKENS), 1e-4)
    assert (logits - fgpt.apply(before, TOKENS)).abs().max() > 0.1


@pytest.mark.parametrize("method", CHANGE_THE_BASE)
def test_per_example_gradients_and_hessian_products_at_the_beginning(method: str) -> None:
    before = astype(tiny(), torch.float64)
    params, adapters = CHANGE_THE_BASE[method](before, rank=3)

    def example_loss(a: fgpt.Adapters, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return fgpt.loss(fgpt.adapt(params, a), fgpt.Batch(x[None], y[None], torch.ones(1, len(x))))

    rows = vmap(grad(example_loss), in_dims=(None, 0, 0))(adapters, BATCH.tokens, BATCH.targets)
    for i in range(3):
        one = grad(example_loss)(adapters, BATCH.tokens[i], BATCH.targets[i])
        close(tree_map(lambda x, i=i: x[i], rows), one, 1e-10)
        assert all(g.abs().max() > 0 for path, g in leaves(one).items() if ".o/" in path)
    rng = torch.Generator().manual_seed(2)
    v = tree_map(lambda x: torch.randn(x.shape, generator=rng, dtype=x.dtype), adapters)

    def gradient(a: fgpt.Adapters) -> fgpt.Adapters:
        return grad(example_loss)(a, BATCH.tokens[0], BATCH.targets[0])

    product = jvp(gradient, (adapters,), (v,))[1]
    ahead, behind = (gradient(tree_map(lambda x, d, s=s: x + s * 1e-5 * d, adapters, v)) for s in (1, -1))
    finite = tree_map(lambda x, y: (x - y) / 2e-5, ahead, behind)
    size = max(float(x.abs().max()) for x in leaves(product).values())
    close(product, finite, 1e-6 * size)


# --------------------------------------------------------------------------------------------------- what they begin as


@given(st.integers(0, 99), st.integers(2, 7), st.integers(2, 7), st.data())
def test_pissa_is_the_truncated_svd(seed: int, out: int, inp: int, data: st.DataObject) -> None:
    w, rank = random_matrix(seed, out, inp), data.draw(st.integers(1, min(out, inp)))
    alpha, rs = data.draw(st.floats(0.5, 20)), data.draw(st.booleans())
    params, adapters = fgpt.pissa(layers(w), rank, alpha, "layer0", rs)
    x: Any = adapters["layer0"]
    u, s, vh = np.linalg.svd(w.numpy(), full_matrices=False)
    scale = alpha / (rank**0.5 if rs else rank)
    np.testing.assert_allclose(scale * (x.b @ x.a), (u[:, :rank] * s[:rank]) @ vh[:rank], atol=1e-9)
    np.testing.assert_allclose(params["layer0"].w, (u[:, rank:] * s[rank:]) @ vh[rank:], atol=1e-9)
    np.testing.assert_allclose(x.a @ x.a.T, np.diag(s[:rank] / scale), atol=1e-9)
    np.testing.assert_allclose(x.b.T @ x.b, np.diag(s[:rank] / scale), atol=1e-9)


def test_power_iterations_find_the_same_components_the_more_of_them_the_nearer() -> None:
    spectrum = torch.arange(1, 31, dtype=torch.float64) ** -0.5
    q, r = (torch.linalg.qr(random_matrix(seed, n, 30)).Q for seed, n in ((0, 40), (1, 50)))
    w = q @ spectrum.diag() @ r.T
    errors: list[float] = []
    for iterations in (0, 2, 16):
        params, _ = fgpt.pissa(layers(w), 4, target="layer0", svd_iterations=iterations)
        errors.append(float(params["layer0"].w.norm()))
    best = float(spectrum[4:].norm())
    assert errors[0] > errors[1] > errors[2] >= best - 1e-12
    assert errors[0] > 1.05 * best
    assert errors[2] == pytest.approx(best, rel=1e-3)
    again, _ = fgpt.pissa(layers(w), 4, target="layer0", svd_iterations=2)
    assert float(again["layer0"].w.norm()) == errors[1]  # no random numbers are drawn from a global generator


def test_quantization_after_pissa_rounds_less() -> None:
    spectrum = torch.arange(1, 65, dtype=torch.float32) ** -1.0
    q, r = (torch.linalg.qr(torch.randn(64, 64, generator=fgpt.key(seed))).Q for seed in (0, 1))
    w = q @ spectrum.diag() @ r
    params, adapters = fgpt.pissa(layers(w), 8, target="layer0")
    rounded = fgpt.adapt(fgpt.quantize(params, "nf4", target="layer0"), adapters)
    alone = fgpt.quantize(layers(w), "nf4", target="layer0")
    error, error_alone = (fgpt.dense(x["layer0"].w).sub(w).norm() for x in (rounded, alone))
    assert error < 0.5 * error_alone


@given(st.integers(0, 99), st.integers(2, 7), st.integers(2, 7), st.data())
def test_olora_is_the_beginning_of_the_qr_decomposition(seed: int, out: int, inp: int, data: st.DataObject) -> None:
    w, rank = random_matrix(seed, out, inp), data.draw(st.integers(1, min(out, inp)))
    params, adapters = fgpt.olora(layers(w), rank, 3.0 * rank, "layer0")
    x: Any = adapters["layer0"]
    q, r = np.linalg.qr(w.numpy())
    np.testing.assert_allclose(x.b @ x.a, q[:, :rank] @ r[:rank], atol=1e-9)
    np.testing.assert_allclose(x.b.T @ x.b, np.eye(rank), atol=1e-9)
    np.testing.assert_allclose(params["layer0"].w, w - 3 * q[:, :rank] @ r[:rank], atol=1e-9)


def test_the_first_step_of_lora_ga_is_the_best_of_rank_2r() -> None:
    """-η (∂L/∂A, ∂L/∂B) changes s·B·A by -η s² c² times the truncated SVD of ∂L/∂W, up to η²."""
    before, rank, alpha = astype(tiny(), torch.float64), 3, 5.0
    params, adapters = fgpt.lora_ga(before, batch_loss, rank, alpha, gamma=7.0)
    weights = {path: weight_at(before, path).clone().requires_grad_() for path in adapters}
    batch_loss(replace_at(before, {f"{path}.w": w for path, w in weights.items()})).backward()
    slopes: Any = grad(lambda a: batch_loss(fgpt.adapt(params, a)))(adapters)
    for path, w in weights.items():
        x: Any = adapters[path]
        assert w.grad is not None
        u, s, vh = np.linalg.svd(w.grad.numpy(), full_matrices=False)
        best = (u[:, : 2 * rank] * s[: 2 * rank]) @ vh[: 2 * rank]
        change = x.scale * (x.b @ slopes[path].a + slopes[path].b @ x.a)
        c = w.shape[0] ** 0.25 / 7.0**0.5
        np.testing.assert_allclose(change, (alpha / rank * c) ** 2 * best, atol=1e-10)
        np.testing.assert_allclose(x.a @ x.a.T, c**2 * np.eye(rank), atol=1e-10)
        np.testing.assert_allclose(np.abs(vh[:rank] @ x.a.numpy().T), c * np.eye(rank), atol=1e-6)


def test_lora_ga_differentiates_the_matrices_of_its_target_alone() -> None:
    counted: list[set[str]] = []

    def loss(params: fgpt.GPT) -> torch.Tensor:
        counted.append({p for p, x in leaves(params).items() if is_gradtrackingtensor(x)})
        return batch_loss(params)

    fgpt.lora_ga(tiny(), loss, rank=2, target=r"blocks\.1\.attn\.(q|o)")
    assert counted == [{"blocks.1.attn.q.w", "blocks.1.attn.o.w"}]


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("method", CHANGE_THE_BASE)
def test_what_cannot_be_initialized_is_said(method: str) -> None:
    initialize, params = CHANGE_THE_BASE[method], tiny(d_model=64)
    quantized = fgpt.quantize(params, "nf4", target=r".*\.q")
    with pytest.raises(fgpt.InputError, match=r"blocks.0.attn.q is Blockwise4bit, .*: initialize on the plain params"):
        initialize(quantized, rank=2)
    adapted = fgpt.adapt(params, fgpt.lora(params, fgpt.key(0), rank=2))
    with pytest.raises(fgpt.InputError, match=r"blocks.0.attn.q is Adapted"):
        initialize(adapted, rank=2)
    with pytest.raises(fgpt.InputError, match=r"rank 41 on blocks.0.mlp.up: expected 1 to 40"):
        initialize(params, rank=41, target=r".*\.up")
    with pytest.raises(fgpt.InputError, match=r"rank 0 on"):
        initialize(params, rank=0)
    with pytest.raises(fgpt.InputError, match=r"alpha is -1: expected a positive number"):
        initialize(params, rank=2, alpha=-1)
    with pytest.raises(fgpt.InputError, match="matches no path"):
        initialize(params, rank=2, target="nothing")


def test_lora_ga_says_what_rank_it_can_have_and_that_gamma_is_positive() -> None:
    with pytest.raises(fgpt.InputError, match=r"rank 9 on blocks.0.attn.q: .* of \[16, 16\], so at most rank 8"):
        fgpt.lora_ga(tiny(), batch_loss, rank=9)
    with pytest.raises(fgpt.InputError, match="gamma is 0: expected a positive number"):
        fgpt.lora_ga(tiny(), batch_loss, rank=2, gamma=0)


def test_the_base_itself_is_untouched() -> None:
    params = tiny()
    before = tree_map(torch.clone, params)
    for initialize in CHANGE_THE_BASE.values():
        initialize(params, rank=2)
    assert same(params, before)
