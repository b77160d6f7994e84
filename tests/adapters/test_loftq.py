"""LoftQ: a quantized base and adapters that are nearer to the full base than the quantized one alone."""

from typing import Any

import numpy as np
import pytest
import torch
from builders import close, tiny
from builders.adapters import step_loss
from builders.initialized import BATCH, TOKENS, weight_at
from builders.quantized import FORMATS
from torch.func import grad, jvp, vmap

import fgpt
from fgpt.kernels.quantized_linear import quantize_matrix, reference
from fgpt.model import Linear
from fgpt.tree import astype, leaves, tree_map

PLAIN = tiny(d_model=64, d_mlp=128)
FUSED = fgpt.fuse_qkv(PLAIN)


def error_norms(params: fgpt.GPT, adapters: Any, full: fgpt.GPT) -> dict[str, float]:
    """‖W' + s·B·A - W‖ of each layer of `adapters`, in fp64."""
    errors: dict[str, float] = {}
    for path, x in adapters.items():
        meaning = reference(weight_at(params, path)).double() + x.scale * x.b.double() @ x.a.double()
        errors[path] = float((meaning - weight_at(full, path).double()).norm())
    return errors


@pytest.mark.parametrize("full", [PLAIN, FUSED, astype(PLAIN, torch.bfloat16)], ids=["fp32", "fused", "bf16"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_matrix_is_nearer_than_its_rounding_and_nearer_with_iterations(format: Any, full: fgpt.GPT) -> None:
    quantized, fresh = fgpt.quantize(full, format), fgpt.lora(full, fgpt.key(0), rank=8)
    previous = error_norms(quantized, fresh, full)
    assert previous.keys() == fresh.keys()
    for iterations in (1, 2, 6):
        errors = error_norms(*fgpt.loftq(full, format, rank=8, iterations=iterations), full)
        for path, error in errors.items():
            assert error <= previous[path] * (0.95 if iterations == 1 else 1)
        previous = errors


@pytest.mark.parametrize("format", FORMATS)
def test_logits_are_nearer_to_those_of_the_full_base(format: Any) -> None:
    params, adapters = fgpt.loftq(PLAIN, format, rank=16)
    exact, quantized = fgpt.apply(PLAIN, TOKENS), fgpt.quantize(PLAIN, format)
    merged = fgpt.merge(fgpt.adapt(params, adapters), base="dequantized")  # int8 matmuls would round inputs as well
    alone = fgpt.merge(quantized, base="dequantized")
    assert (fgpt.apply(merged, TOKENS) - exact).norm() < 0.9 * (fgpt.apply(alone, TOKENS) - exact).norm()
    if format != "int8":
        close(fgpt.functional_call(fgpt.apply, (params, adapters), TOKENS), fgpt.apply(merged, TOKENS), 1e-4)


@pytest.mark.parametrize("rs", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_two_iterations_are_those_of_the_paper(format: Any, rs: bool) -> None:
    """The better of two, by numpy's decomposition."""
    w = torch.randn(24, 64, generator=fgpt.key(3))
    candidates: list[tuple[float, np.ndarray]] = []
    update = torch.zeros_like(w)
    for _ in range(2):
        rounded = reference(quantize_matrix(w - update, format))
        u, s, vh = np.linalg.svd((w - rounded).double().numpy(), full_matrices=False)
        low = (u[:, :4] * s[:4]) @ vh[:4]
        update = torch.from_numpy(low).float()
        candidates.append((float(np.linalg.norm(w - rounded - low)), low))
    params, adapters = fgpt.loftq({"layer": Linear(w)}, format, 4, 6.0, "layer", rs, iterations=2)
    x: Any = adapters["layer"]
    assert x.scale == pytest.approx(6 / (2 if rs else 4))
    assert error_norms(params, adapters, {"layer": Linear(w)})["layer"] == pytest.approx(min(candidates)[0], rel=1e-4)  # pyright: ignore
    np.testing.assert_allclose(x.scale * x.b @ x.a, min(candidates)[1], atol=2e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_an_iteration_that_leads_away_is_not_returned(format: Any) -> None:
    """The paper's own sequence of errors rises here between some of the eight iterations."""
    layer: Any = {"layer": Linear(torch.randn(24, 64, generator=fgpt.key(2)))}
    errors: list[float] = []
    for iterations in range(1, 9):
        params, adapters = fgpt.loftq(layer, format, 4, target="layer", iterations=iterations)
        errors.append(error_norms(params, adapters, layer)["layer"])
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) < 8


def test_a_step_and_second_derivatives_over_the_quantized_base() -> None:
    params, adapters = fgpt.loftq(PLAIN, "nf4", rank=4, iterations=1)

    def example_loss(a: fgpt.Adapters, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return fgpt.loss(fgpt.adapt(params, a), fgpt.Batch(x[None], y[None], torch.ones(1, len(x))))

    rows = vmap(grad(example_loss), in_dims=(None, 0, 0))(adapters, BATCH.tokens, BATCH.targets)
    for i in range(3):
        one = grad(example_loss)(adapters, BATCH.tokens[i], BATCH.targets[i])
        close(tree_map(lambda x, i=i: x[i], rows), one, 1e-5)
    product = jvp(lambda a: grad(example_loss)(a, BATCH.tokens[0], BATCH.targets[0]), (adapters,), (adapters,))[1]
    assert all(bool(x.isfinite().all()) for x in leaves(product).values())
    optimizer = fgpt.adamw(1e-2)
    step = fgpt.make_step(step_loss, optimizer)
    state, first = step(fgpt.init_state(adapters, optimizer), params, [BATCH], None)
    assert float(first.loss) == pytest.approx(float(fgpt.loss(fgpt.adapt(params, adapters), BATCH)), rel=1e-6)
    assert step(state, params, [BATCH], None)[1].loss < first.loss


def test_fast_decompositions_come_as_near() -> None:
    errors = error_norms(*fgpt.loftq(PLAIN, rank=8, iterations=1), PLAIN)
    fast = error_norms(*fgpt.loftq(PLAIN, rank=8, iterations=1, svd_iterations=8), PLAIN)
    for path, error in errors.items():
        assert error - 1e-5 <= fast[path] < 1.01 * error


def test_scales_in_fp32_and_layers_outside_the_target() -> None:
    params: Any
    params, adapters = fgpt.loftq(PLAIN, rank=4, target=r".*\.(q|v)", double_quant=False)
    assert isinstance(params.blocks[0].attn.q.w.absmax, torch.Tensor)
    assert isinstance(params.blocks[0].attn.k.w, torch.Tensor)
    assert len(adapters) == 4
    rest = fgpt.quantize(params, target=r".*\.(k|o|up|down)")
    assert fgpt.functional_call(fgpt.apply, (rest, adapters), TOKENS).isfinite().all()


def test_errors() -> None:
    quantized = fgpt.quantize(PLAIN, "int8")
    with pytest.raises(fgpt.InputError, match=r"blocks.0.attn.q is RowwiseInt8, .*: initialize on the plain params"):
        fgpt.loftq(quantized)
    with pytest.raises(fgpt.InputError, match="iterations is 0: expected 1 or more"):
        fgpt.loftq(PLAIN, iterations=0)
    with pytest.raises(fgpt.InputError, match=r"rows of 40 elements: nf4 needs a multiple of 64"):
        fgpt.loftq(tiny(), target=r".*\.down")
