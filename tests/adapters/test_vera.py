"""VeRA: two vectors for each layer, beside PEFT's, over any base."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import close, same, tiny, tokens, with_noise
from builders.adapters import three_steps
from builders.hf_models import hf_model, save_and_load
from builders.initialized import BATCH
from torch.func import grad, jvp, vmap
from torch.nn import functional as F

import fgpt
from fgpt.adapter_vera import VeRA
from fgpt.tree import get_at, replace_at, tree_map

pytestmark = pytest.mark.usefixtures("exact_derivatives")

TEXT = tokens(31, 2, 7)
MODULES = {"q": "self_attn.q_proj", "v": "self_attn.v_proj"}


def test_logits_and_gradients_are_pefts() -> None:
    model = hf_model("llama")
    base = save_and_load(model)
    config = peft.VeraConfig(r=6, target_modules=["q_proj", "v_proj"], vera_dropout=0.0, task_type="CAUSAL_LM")
    theirs: Any = peft.get_peft_model(model, config)
    params, adapters = fgpt.vera(base, fgpt.key(0), rank=6, target=r".*\.(q|v)")
    shared = theirs.base_model.vera_A["default"], theirs.base_model.vera_B["default"]
    matrices: dict[str, Any] = {}
    vectors: dict[str, VeRA] = {}
    layers: dict[str, Any] = {}
    for path, fresh in adapters.items():
        _, i, _, part = path.split(".")
        layer = layers[path] = theirs.base_model.model.model.layers[int(i)].get_submodule(MODULES[part])
        d, b = layer.vera_lambda_d["default"], layer.vera_lambda_b["default"]
        assert isinstance(fresh, VeRA)
        assert torch.equal(fresh.d, d)
        assert torch.equal(fresh.b, b)
        b.data.normal_(generator=fgpt.key(int(i)))
        vectors[path] = VeRA(d.detach().clone(), b.detach().clone())
        w: Any = get_at(params, path).w
        matrices |= {f"{path}.w.a": shared[0][:, : w.a.shape[1]], f"{path}.w.b": shared[1][: w.b.shape[0]]}
    params = replace_at(params, matrices)

    def loss(vectors: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits = fgpt.functional_call(fgpt.apply, (params, vectors), TEXT)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), TEXT[:, 1:].flatten()), logits

    logits = theirs(input_ids=TEXT).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), TEXT[:, 1:].flatten()).backward()
    grads, ours = grad(loss, has_aux=True)(vectors)
    close(ours, logits.detach(), 1e-4)
    assert (ours - fgpt.apply(base, TEXT)).abs().max() > 0.1
    for path, layer in layers.items():
        close(grads[path].d, layer.vera_lambda_d["default"].grad, 1e-4)
        close(grads[path].b, layer.vera_lambda_b["default"].grad, 1e-4)


def test_matrices_are_drawn_once_from_the_key_and_within_their_bounds() -> None:
    base = tiny(d_model=64, d_mlp=128)
    params, adapters = fgpt.vera(base, fgpt.key(3), rank=32)
    again, _ = fgpt.vera(base, fgpt.key(3), rank=32)
    other, _ = fgpt.vera(base, fgpt.key(4), rank=32)
    assert same(params, again)
    assert not same(params, other)
    up, down = params.blocks[0].mlp.up.w, params.blocks[1].mlp.down.w
    assert isinstance(up, fgpt.Adapted)
    assert isinstance(down, fgpt.Adapted)
    assert up.a is not None and down.a is not None  # noqa: PT018
    assert up.a.untyped_storage().data_ptr() == down.a.untyped_storage().data_ptr()  # one A in memory
    assert torch.equal(up.a, down.a[:, :64])
    bound = (6 / 128) ** 0.5
    assert 0.95 * bound < down.a.abs().max() < bound
    assert fgpt.num_trainable(adapters) == sum(32 + len(x.b) for x in adapters.values() if isinstance(x, VeRA))


@pytest.mark.parametrize("format", [None, "nf4", "int8"])
def test_training_moves_the_vectors_alone(format: Any) -> None:
    base = tiny(d_model=64, d_mlp=128)
    base = base if format is None else fgpt.quantize(base, format)
    params, adapters = fgpt.vera(base, fgpt.key(0), rank=16)
    close(fgpt.functional_call(fgpt.apply, (params, adapters), TEXT), fgpt.apply(base, TEXT), 1e-5)
    before = tree_map(torch.clone, params)
    _, losses = three_steps(params, adapters, BATCH)
    assert losses == sorted(losses, reverse=True)
    assert same(params, before)


def test_under_transforms_and_merged(tmp_path: Any) -> None:
    base = tiny(d_model=64, d_mlp=128)
    params, fresh = fgpt.vera(base, fgpt.key(0), rank=16)
    adapters = with_noise(fresh, 0.1)

    def loss(a: Any, text: torch.Tensor) -> torch.Tensor:
        batch = fgpt.Batch(text[:-1], text[1:], torch.ones(len(text) - 1))
        return fgpt.loss(fgpt.adapt(params, a), batch)

    each = vmap(grad(loss), in_dims=(None, 0))(adapters, TEXT)
    close(tree_map(lambda x: x[1], each), grad(loss)(adapters, TEXT[1]), 1e-5)
    _, hv = jvp(lambda a: grad(loss)(a, TEXT[0]), (adapters,), (fresh,))
    moved = [tree_map(lambda x, v, s=s: x + s * 1e-2 * v, adapters, fresh) for s in (1, -1)]
    finite = tree_map(lambda x, y: (x - y) / 2e-2, *(grad(loss)(a, TEXT[0]) for a in moved))
    close(hv, finite, 2e-3)
    merged = fgpt.merge(fgpt.adapt(params, adapters))
    close(fgpt.apply(merged, TEXT), fgpt.functional_call(fgpt.apply, (params, adapters), TEXT), 1e-4)
    fgpt.save_adapters(adapters, tmp_path / "vera.safetensors")
    assert same(fgpt.load_adapters(tmp_path / "vera.safetensors", params), adapters)


def test_wrong_uses_are_one_line() -> None:
    base = tiny()
    _, adapters = fgpt.vera(base, fgpt.key(0), rank=4)
    with pytest.raises(fgpt.InputError, match=r"VeRA at blocks\.0\.attn\.q: the base has no A and B there; adapt the"):
        fgpt.adapt(base, adapters)
    other, _ = fgpt.vera(base, fgpt.key(0), rank=5)
    with pytest.raises(fgpt.InputError, match="is for rank 4 and 16 outputs, but the base has rank 5 and 16 outputs"):
        fgpt.adapt(other, adapters)
    with pytest.raises(fgpt.InputError, match="rank is 0: expected 1 or more"):
        fgpt.vera(base, fgpt.key(0), rank=0)


def test_what_is_no_lora_is_combined_over_its_base_alone_by_a_rank() -> None:
    params, adapters = fgpt.vera(tiny(), fgpt.key(0), rank=4)
    sets = [with_noise(adapters), adapters]
    with pytest.raises(fgpt.InputError, match=r"is no LoRA, and the base is Adapted there: give a rank"):
        fgpt.combine(params, sets, weights=[1, -1])
    combined = fgpt.combine(params, sets, weights=[1, -1], rank=4)
    logits = fgpt.functional_call(fgpt.apply, (params, combined), TEXT)
    close(logits, fgpt.functional_call(fgpt.apply, (params, sets[0]), TEXT), 1e-4)


def test_no_file_of_pefts_is_written(tmp_path: Path) -> None:
    params, adapters = fgpt.vera(tiny(), fgpt.key(0), rank=4)
    with pytest.raises(fgpt.InputError, match="no file of PEFT's is written for VeRA: save_adapters"):
        fgpt.save_peft(adapters, params, tmp_path, base="tiny")
