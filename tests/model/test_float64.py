"""A tree of doubles stays one: its loss is that of an independent float64 computation, and finite differences agree."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import tiny, tokens, with_noise
from torch import Tensor
from torch.func import grad
from torch.utils._pytree import tree_leaves

import fgpt
from fgpt.kernels.quantized_linear import dequantize, quantize_matrix
from fgpt.kernels.quantized_linear import reference as definition
from fgpt.kernels.rotary import rope_cos_sin
from fgpt.tree import astype, tree_map

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {
        "rotary_dim": 8,
        "norm_type": "rms",
        "gated_mlp": True,
        "activation": "silu",
        "n_kv": 1,
        "qk_norm": True,
        "biases": frozenset(),
        "tie_word_embeddings": False,
        "norm_eps": 1e-6,
    },
}
ROWS = tokens(31, 3, 10)
BATCH = fgpt.Batch(ROWS[:, :-1], ROWS[:, 1:], torch.rand(3, 9, generator=fgpt.key(1)))


def model(name: str) -> fgpt.GPT:
    return astype(tree_map(lambda x: 0.5 * x, tiny(**SHAPES[name])), torch.float64)


def reference(p: Any, batch: fgpt.Batch) -> Tensor:
    """The mean loss, written out."""
    cfg = p.cfg
    d = cfg.head_size

    def norm(x: Tensor, n: Any) -> Tensor:
        if cfg.norm_type == "rms":
            return x / (x.pow(2).mean(-1, keepdim=True) + cfg.norm_eps).sqrt() * n.w
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + cfg.norm_eps).sqrt() * n.w + n.b

    def layer(x: Tensor, part: Any) -> Tensor:
        y = x @ part.w.T
        return y if part.b is None else y + part.b

    def rotate(x: Tensor) -> Tensor:
        if not cfg.rotary_dim:
            return x
        theta = cfg.rope_theta ** -(torch.arange(0, d, 2, dtype=torch.float64) / d)
        angle = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * theta
        z = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag], -1)

    def heads(x: Tensor, part: Any, scale: Any = None) -> Tensor:
        y = layer(x, part).unflatten(-1, (-1, d)).transpose(1, 2)
        return y if scale is None else norm(y, scale)

    x = p.wte.w[batch.tokens]
    x = x if p.wpe is None else x + p.wpe.w[: x.shape[1]]
    past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    for block in p.blocks:
        a, y = block.attn, norm(x, block.ln_1)
        q, k, v = rotate(heads(y, a.q, a.q_norm)), rotate(heads(y, a.k, a.k_norm)), heads(y, a.v)
        k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))
        scores = (q @ k.mT / d**0.5).masked_fill(~past, -torch.inf)
        x = x + layer((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), a.o)
        y = norm(x, block.ln_2)
        up = layer(y, block.mlp.up)
        wide = F.silu(layer(y, block.mlp.gate)) * up if cfg.gated_mlp else F.gelu(up, approximate="tanh")
        x = x + layer(wide, block.mlp.down)
    head = p.wte.w if p.head is None else p.head.w
    log_p = (norm(x, p.ln_f) @ head.T).log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
    weights = batch.weights.double()
    return -(weights * log_p).sum() / weights.sum()


@pytest.mark.parametrize("name", SHAPES)
def test_the_loss_is_that_of_float64(name: str):
    p = model(name)
    got = fgpt.loss(p, BATCH)
    assert got.dtype == torch.float64
    assert abs(float(got - reference(p, BATCH))) < 1e-12
    jvp = torch.func.jvp(lambda p: fgpt.loss(p, BATCH), (p,), (tree_map(torch.zeros_like, p),))[0]  # by the references
    assert abs(float(jvp - reference(p, BATCH))) < 1e-12


def between(f: Any, at: Any, v: Any, h: float = 1e-3) -> float:
    """The slope of f along v by central differences of sixth order."""
    terms = [(1, 45 / 60), (2, -9 / 60), (3, 1 / 60)]
    ends = [(c, [f(tree_map(lambda x, y, s=s, k=k: x + s * k * h * y, at, v)) for s in (1, -1)]) for k, c in terms]
    return float(sum(c * (plus - minus) for c, (plus, minus) in ends) / h)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "tune"])
@pytest.mark.parametrize("name", SHAPES)
def test_finite_differences_agree(name: str, kind: str):
    p = model(name)
    fresh: Any = {
        "lora": lambda: fgpt.lora(p, fgpt.key(0), 2, target=r"blocks\..*"),
        "dora": lambda: fgpt.dora(p, fgpt.key(0), 2),
        "ia3": lambda: fgpt.ia3(p),
        "tune": lambda: fgpt.trainable_leaves(p, ".*"),
    }[kind]()
    at = astype(with_noise(fresh, 0.05), torch.float64)
    assert {x.dtype for x in tree_leaves(fgpt.trainable_leaves(p, ".*"))} == {torch.float64}

    def f(a: Any) -> Tensor:
        return fgpt.loss(fgpt.adapt(p, a), BATCH)

    def direction(x: Tensor) -> Tensor:
        return 0.3 * torch.randn(x.shape, generator=fgpt.key(x.numel()), dtype=x.dtype)

    v = tree_map(direction, at)
    if kind == "dora":  # its gradient takes the norm of V as a constant: only m has the derivative of the loss
        v = {path: fgpt.DoRA(tree_map(torch.zeros_like, x.lora), x.m) for path, x in v.items()}
    slope = sum((x * y).sum() for x, y in zip(tree_leaves(grad(f)(at)), tree_leaves(v), strict=True))
    assert abs(float(slope)) > 1e-4
    assert abs(between(f, at, v) - float(slope)) < 1e-8


def test_angles_of_doubles_are_exact():
    cos, sin = rope_cos_sin(torch.arange(1000), 8, 10000.0, dtype=torch.float64)
    theta = 10000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angle = torch.arange(1000, dtype=torch.float64)[:, None] * theta
    assert (cos[0] - angle.cos()).abs().max() < 1e-12
    assert (sin[0] - angle.sin()).abs().max() < 1e-12
    assert rope_cos_sin(torch.arange(3), 8, 10000.0, dtype=torch.bfloat16)[0].dtype == torch.float32


@pytest.mark.parametrize("to", ["nf4", "fp4", "int8", "blockwise8"])
def test_a_quantized_matrix_in_doubles_is_its_definition(to: Any):
    w = quantize_matrix(torch.randn(64, 192, generator=fgpt.key(0), dtype=torch.float64), to)
    before = torch.full((64, 192), 7.0, dtype=torch.float64)  # what memory that nobody writes may hold
    del before
    for got in (dequantize(w), dequantize(w, torch.float64)):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, definition(w).double(), atol=1e-6, rtol=1e-6)
