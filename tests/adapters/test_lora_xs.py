"""LoRA-XS: only a small matrix between frozen singular vectors is trained, over any base."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import close, same, tiny
from builders.adapters import three_steps
from builders.initialized import BATCH, FAMILIES, TOKENS, base, weight_at
from torch.func import grad, jvp, vmap

import fgpt
from fgpt.adapter_lora import LoRA
from fgpt.tree import astype, tree_map


@pytest.mark.parametrize("rs", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_a_lora_whose_a_is_the_product(family: str, rs: bool) -> None:
    before = astype(base(family), torch.float64)
    params, adapters = fgpt.lora_xs(before, 3, 5.0, rs=rs)
    assert fgpt.num_trainable(adapters) == 9 * len(adapters)
    close(fgpt.functional_call(fgpt.apply, (params, adapters), TOKENS), fgpt.apply(before, TOKENS), 1e-12)
    mids: Any = tree_map(lambda x: x + torch.randn(x.shape, generator=fgpt.key(5), dtype=x.dtype), adapters)
    loras: fgpt.Adapters = {}
    for path in fgpt.lora(before, fgpt.key(0), rank=3):
        u, s, vh = (torch.from_numpy(x) for x in np.linalg.svd(weight_at(before, path).numpy(), full_matrices=False))
        w = weight_at(params, path)
        signs = (w.b * u[:, :3]).sum(0)
        close(signs.abs(), torch.ones(3, dtype=torch.float64), 1e-10)
        a = mids[f"{path}.w.mid"] @ (signs * s[:3])[:, None].mul(vh[:3])
        loras[path] = LoRA(a, signs * u[:, :3], 5.0, rs)
    logits = fgpt.functional_call(fgpt.apply, (params, mids), TOKENS)
    close(logits, fgpt.functional_call(fgpt.apply, (before, loras), TOKENS), 1e-10)
    close(fgpt.apply(fgpt.merge(fgpt.adapt(params, mids)), TOKENS), logits, 1e-10)


@pytest.mark.parametrize("format", [None, "nf4", "int8"])
def test_training_moves_m_alone(format: Any, tmp_path: Path) -> None:
    before = tiny(d_model=64, d_mlp=128)
    before = before if format is None else fgpt.quantize(before, format)
    params, adapters = fgpt.lora_xs(before, rank=4)
    copy = tree_map(torch.clone, params)
    trained, losses = three_steps(params, adapters, BATCH)
    assert losses[0] == pytest.approx(float(fgpt.loss(before, BATCH)), rel=1e-5)
    assert losses == sorted(losses, reverse=True)
    assert same(params, copy)
    assert all(bool((x != 0).all()) for x in trained.values())
    fgpt.save_adapters(trained, tmp_path / "mids.safetensors")
    again = fgpt.lora_xs(before, rank=4)[0]  # on one machine A and B are the same again
    reloaded = fgpt.load_adapters(tmp_path / "mids.safetensors", again)
    logits = fgpt.functional_call(fgpt.apply, (params, trained), TOKENS)
    close(fgpt.functional_call(fgpt.apply, (again, reloaded), TOKENS), logits, 1e-6)


def test_per_example_gradients_hessian_products_and_mapped_members() -> None:
    params, adapters = fgpt.lora_xs(astype(tiny(), torch.float64), rank=3)
    mids = tree_map(lambda x: x + 0.1 * torch.randn(x.shape, generator=fgpt.key(5), dtype=x.dtype), adapters)

    def example_loss(m: fgpt.Adapters, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return fgpt.loss(fgpt.adapt(params, m), fgpt.Batch(x[None], y[None], torch.ones(1, len(x))))

    def gradient(m: fgpt.Adapters) -> fgpt.Adapters:
        return grad(example_loss)(m, BATCH.tokens[0], BATCH.targets[0])

    rows = vmap(grad(example_loss), in_dims=(None, 0, 0))(mids, BATCH.tokens, BATCH.targets)
    close(tree_map(lambda x: x[0], rows), gradient(mids), 1e-12)
    members = tree_map(lambda x, y: torch.stack([x, y]), mids, adapters)
    both = vmap(gradient)(members)
    close(tree_map(lambda x: x[1], both), gradient(adapters), 1e-12)
    product = jvp(gradient, (mids,), (adapters | mids,))[1]
    ahead, behind = (gradient(tree_map(lambda x, s=s: (1 + s * 1e-5) * x, mids)) for s in (1, -1))
    close(product, tree_map(lambda x, y: (x - y) / 2e-5, ahead, behind), 1e-8)


def test_two_of_them_combine_by_their_ms_and_dora_lies_over_them() -> None:
    params, adapters = fgpt.lora_xs(tiny(), rank=3)
    first, second = (tree_map(lambda x, i=i: x + torch.randn(x.shape, generator=fgpt.key(i)), adapters) for i in (5, 6))
    mean = fgpt.combine(params, [first, second], [0.25, 0.75])
    close(mean, tree_map(lambda x, y: 0.25 * x + 0.75 * y, first, second), 1e-6)
    adapted = fgpt.adapt(params, first)
    stacked = fgpt.adapt(adapted, fgpt.dora(adapted, fgpt.key(7), rank=2))
    close(fgpt.apply(stacked, TOKENS), fgpt.apply(adapted, TOKENS), 1e-4)
    vector = fgpt.task_vector(params, first | fgpt.lora(params, fgpt.key(8), rank=2))
    w = weight_at(params, "blocks.0.attn.q")
    change: Any = w.scale * w.b @ first["blocks.0.attn.q.w.mid"] @ w.a
    close(vector["blocks.0.attn.q.w"], change, 1e-6)


def test_errors() -> None:
    with pytest.raises(fgpt.InputError, match=r"rank 17 on blocks.0.attn.q"):
        fgpt.lora_xs(tiny(), rank=17)
    params, _ = fgpt.lora_xs(tiny(), rank=2)
    with pytest.raises(fgpt.InputError, match=r"tensor at blocks.0.attn.q.w.mid has shape \[3, 3\], but .* \[2, 2\]"):
        fgpt.adapt(params, {"blocks.0.attn.q.w.mid": torch.zeros(3, 3)})
