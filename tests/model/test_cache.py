"""Cached passes and greedy text are those of one pass; files round-trip."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from builders import close, gpt2_shape, hf_gpt2, load_hf_model, same, tiny, tokens, with_noise
from builders.hf_models import hf_model, save_and_load
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.func import grad, vmap

import fgpt
from fgpt.model import hidden_after, pad_prompts, read_prompts
from fgpt.tree import num_elements, ravel

# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_load_then_save_is_the_identity(dtype: torch.dtype, tied: bool, tmp_path: Path):
    """Bitwise, by name, in whatever dtype the file has."""
    model = hf_gpt2(tie_word_embeddings=tied).to(dtype)
    params = load_hf_model(model, tmp_path / "theirs", dtype=None)
    fgpt.save(params, tmp_path / "ours")
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert same(old, new)
    assert {x.dtype for x in new.values()} == {dtype}
    assert same(fgpt.load(str(tmp_path / "ours"), dtype=None), params)


# -------------------------------------------------------------------------------------------------------------- extend


@given(st.data())
def test_any_chunking_is_one_pass(data: st.DataObject):
    """Ragged rows padded on the left, cut anywhere: each chunk sees what one pass sees."""
    params = tiny()
    lengths = data.draw(st.lists(st.integers(1, 10), min_size=1, max_size=3), "lengths")
    width = max(lengths)
    cuts = sorted(data.draw(st.sets(st.integers(1, width - 1)) if width > 1 else st.just(set()), "cuts"))
    segments = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    ragged = min(lengths) < width
    x = tokens(31, len(lengths), width)
    whole = fgpt.hidden(params, x, segments)
    cache, parts = fgpt.KVCache(), []
    for a, b in zip([0, *cuts], [*cuts, width], strict=True):
        text = bool(segments[:, a:b].all())  # what is text in every row needs no segments, as in decoding
        h, cache = fgpt.forward_with_cache(params, x[:, a:b], cache, None if text else segments[:, a:b])
        parts.append(h)
    close(torch.cat(parts, 1), whole, 1e-5)
    assert [tuple(k.shape) for k, _ in cache.kv] == [(len(lengths), 2, width, 8)] * 2
    if not ragged:
        close(whole, fgpt.hidden(params, x), 1e-5)
    for row, n in enumerate(lengths):
        close(whole[row, width - n :], fgpt.hidden(params, x[row : row + 1, width - n :])[0], 1e-5)


@pytest.mark.parametrize("model", ["gpt2", "gptj", "llama", "mistral", "int8", "nf4"])
@pytest.mark.parametrize("remat", [False, True])
def test_rows_after_shared_prompts_are_whole_rows(model: Any, remat: bool):
    """In value and gradient, under grad and vmap(grad), at all positions and at some."""
    if model in ("gptj", "llama", "mistral"):
        base = save_and_load(hf_model(model))
    else:
        base = with_noise(tiny(d_model=64, d_mlp=64), seed=3)
    base = fgpt.quantize(base, model) if model in ("int8", "nf4") else base
    adapters = with_noise(fgpt.lora(base, fgpt.key(0), 2, target=r"blocks\..*"), seed=1)
    prompts, ends = [[5, 6, 7, 8], [9, 10]], tokens(31, 3, 5)
    of_row, positions = torch.tensor([0, 1, 0]), torch.tensor([1, 7, 8, 14])
    shared = pad_prompts(prompts, of_row.tolist())
    weights = torch.randn(3, 5, base.cfg.d_model, generator=fgpt.key(2))

    def after(adapters: Any, weights: Any) -> torch.Tensor:
        params = fgpt.adapt(base, adapters)
        return (hidden_after(params, read_prompts(params, shared, remat), of_row, ends, remat=remat) * weights).sum()

    def after_at(adapters: Any, weights: Any) -> torch.Tensor:
        params = fgpt.adapt(base, adapters)
        h = hidden_after(params, read_prompts(params, shared, remat), of_row, ends, positions, remat)
        return (h * weights.flatten(0, 1)[positions]).sum()

    def whole(adapters: Any, weights: Any) -> torch.Tensor:
        params = fgpt.adapt(base, adapters)
        rows = [torch.cat([torch.tensor(prompts[p]), end]) for p, end in zip(of_row.tolist(), ends, strict=True)]
        return sum((fgpt.hidden(params, row)[-5:] * w).sum() for row, w in zip(rows, weights, strict=True))

    def equal(a: Any, b: Any) -> None:
        if model == "int8":  # it rounds cotangents: those of a prompt's tokens are added up over rows before, not after
            x, y = ravel(a)[0], ravel(b)[0]
            assert float((x - y).norm() / y.norm()) < 0.02
        else:
            close(a, b, 2e-4, 1e-4)

    close(after(adapters, weights), whole(adapters, weights), 2e-4, 1e-4)
    equal(grad(after)(adapters, weights), grad(whole)(adapters, weights))
    selected = torch.zeros(15, 1).index_fill(0, positions, 1.0).view(3, 5, 1) * weights
    close(after_at(adapters, weights), whole(adapters, selected), 2e-4, 1e-4)
    equal(grad(after_at)(adapters, weights), grad(whole)(adapters, selected))
    both = torch.stack([weights, selected])
    per_example = vmap(grad(after), in_dims=(None, 0))(adapters, both)
    equal(per_example, vmap(grad(whole), in_dims=(None, 0))(adapters, both))


def test_a_row_longer_than_the_context_is_refused(gpt: fgpt.GPT):
    with pytest.raises(fgpt.InputError, match="25 tokens in a row, but the model's context is 24"):
        fgpt.apply(gpt, tokens(31, 1, 25))
    _, cache = fgpt.forward_with_cache(gpt, tokens(31, 1, 24), fgpt.KVCache())
    with pytest.raises(fgpt.InputError, match="25 tokens in a row"):
        fgpt.forward_with_cache(gpt, tokens(31, 1, 1), cache)


# ---------------------------------------------------------------------------------------------------------- generation


@pytest.mark.slow
@settings(max_examples=6)
@given(st.lists(st.integers(1, 23), min_size=2, max_size=3), st.integers(0, 99))
def test_greedy_text_is_transformers(lengths: list[int], seed: int):
    """Token by token, row by row; and in a ragged batch each row is what it is alone, to the context's end."""
    with TemporaryDirectory() as folder:
        model = hf_gpt2(seed)
        params = load_hf_model(model, Path(folder))
    prompts = [tokens(31, n, seed=seed + i).tolist() for i, n in enumerate(lengths)]
    together = fgpt.generate(params, prompts, eos_token_id=0, max_new_tokens=30)
    for prompt, got in zip(prompts, together, strict=True):
        room = 24 - len(prompt)
        ids = torch.tensor([prompt])
        options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "eos_token_id": 0, "pad_token_id": 0}
        generated = model.generate(ids, do_sample=False, max_new_tokens=room, **options)[0, len(prompt) :].tolist()
        expected = generated[: generated.index(0)] if 0 in generated else generated
        assert got == fgpt.GenerationOutput(expected, 0 in generated, [])
        assert fgpt.generate(params, [prompt], eos_token_id=0, max_new_tokens=30) == [got]


def test_bad_prompts_are_named(gpt: fgpt.GPT):
    with pytest.raises(fgpt.InputError, match="prompt 1 has 0 tokens: expected 1 to 23"):
        fgpt.generate(gpt, [[1], []], eos_token_id=0, max_new_tokens=1)
    with pytest.raises(fgpt.InputError, match="prompt 0 has 24 tokens"):
        fgpt.generate(gpt, [[1] * 24], eos_token_id=0, max_new_tokens=1)
    with pytest.raises(fgpt.InputError, match="needs a key"):
        fgpt.generate(gpt, [[1]], eos_token_id=0, max_new_tokens=1, sampling=fgpt.SamplingParams(temperature=1.0))


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("layers", "heads", "width", "expected"),
    [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ],
)
def test_gpt2s_four_sizes(layers: int, heads: int, width: int, expected: int):
    assert num_elements(gpt2_shape(layers, heads, width)) == expected
