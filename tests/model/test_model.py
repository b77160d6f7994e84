"""The model is GPT-2: against transformers, against recorded activations, and against itself in other arrangements."""

import base64
import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from builders import SharedData, close, gpt2_shape, hf_gpt2, load_hf_model, same, tiny, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

import fgpt
from fgpt import model as M
from fgpt.kernels import attention
from fgpt.model import forward
from fgpt.tree import num_elements

# ------------------------------------------------------------------------------------------------------ transformers


@st.composite
def architectures(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.sampled_from([1, 2, 3, 4]))
    return {
        "n_layer": draw(st.integers(1, 3)),
        "n_head": heads,
        "n_embd": heads * draw(st.sampled_from([1, 4, 8])) if heads > 1 else draw(st.sampled_from([4, 8])),
        "n_inner": draw(st.sampled_from([None, 5, 33])),
        "n_positions": draw(st.integers(9, 20)),
        "vocab_size": draw(st.sampled_from([2, 17, 50])),
        "layer_norm_epsilon": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "tie_word_embeddings": draw(st.booleans()),
    }


@given(architectures(), st.integers(0, 99))
def test_logits_are_transformers(architecture: dict[str, Any], seed: int):
    model = hf_gpt2(seed, **architecture)
    x = tokens(architecture["vocab_size"], 2, 9, seed=seed)
    with TemporaryDirectory() as folder:
        params = load_hf_model(model, Path(folder) / "theirs")
        fgpt.save(params, Path(folder) / "ours")
        reloaded = GPT2LMHeadModel.from_pretrained(Path(folder) / "ours").eval()
    with torch.no_grad():
        expected = model(x).logits
        close(fgpt.apply(params, x), expected, 1e-5)
        close(fgpt.apply(M.fuse_qkv(params), x), expected, 1e-5)
        close(reloaded(x).logits, expected, 1e-5)
    assert (params.head is None) == architecture["tie_word_embeddings"]
    assert num_elements(params) == sum(p.numel() for p in model.parameters())


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.booleans(), st.integers(0, 99))
def test_padded_rows_are_transformers(lengths: list[int], left: bool, seed: int):
    """A padded row gives its text what transformers gives it under an attention mask and positions from 0."""
    width = max(lengths)
    text = torch.tensor([[n > (width - 1 - j if left else j) for j in range(width)] for n in lengths]).long()
    x = tokens(31, len(lengths), width, seed=seed)
    with TemporaryDirectory() as folder:
        model = hf_gpt2(seed)
        params = load_hf_model(model, Path(folder))
    positions = (text.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(x, attention_mask=text, position_ids=positions).logits
    close(fgpt.apply(params, x, text)[text.bool()], expected[text.bool()], 1e-5)
    if not left:  # the causal mask alone keeps padding on the right out
        close(fgpt.apply(params, x)[text.bool()], expected[text.bool()], 1e-5)


@given(st.lists(st.integers(1, 8), min_size=1, max_size=3), st.integers(0, 99))
def test_packed_rows_are_transformers_document_by_document(lengths: list[int], seed: int):
    x = tokens(31, 1, sum(lengths), seed=seed)
    segments = torch.tensor([[n for n, length in enumerate(lengths, 1) for _ in range(length)]])
    with TemporaryDirectory() as folder:
        model = hf_gpt2(seed)
        params = load_hf_model(model, Path(folder))
    with torch.no_grad():
        expected = torch.cat([model(document).logits for document in x.split(lengths, -1)], 1)
    close(fgpt.apply(params, x, segments), expected, 1e-5)


# ----------------------------------------------------------------------------------------------- recorded activations


def recorded_activations(folder: Path) -> dict[str, Tensor]:
    """Every stage of llm-viz's sorting model, the inner ones of block 0: little-endian fp32 in base64."""
    stages = json.loads((folder / "gpt-nano-sort-t0-partials.json").read_text())
    return {
        name: torch.frombuffer(bytearray(base64.b64decode(x["data"])), dtype=torch.float32).reshape(x["shape"])
        for name, x in stages.items()
        if name != "config"
    }


def test_every_recorded_activation(shared_data: SharedData):
    folder = shared_data("gpt-nano-sort")
    expected, params = recorded_activations(folder), fgpt.load(str(folder))
    cfg, p, x = params.cfg, params.blocks[0], expected["idx"].long()
    got: dict[str, Tensor] = {"idx": x.float()}
    got["tok_emb"] = fgpt.embed(x, params.wte.w)
    got["pos_emb"] = fgpt.embed(torch.arange(x.shape[1]), params.wpe.w)[None]
    got["x"] = got["tok_emb"] + got["pos_emb"]
    got["ln1"] = forward.norm(got["x"], p.ln_1, cfg.norm_eps)
    q, k, v = forward.qkv(got["ln1"], p.attn, cfg)
    got["qkv"] = torch.cat([y.transpose(1, 2).flatten(2) for y in (q, k, v)], -1)
    got |= {"q": q, "k": k, "v": v}
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    got["att"] = scores.masked_fill(~attention.causal(11, 11, x.device), -torch.inf)
    one_hot = torch.eye(16)[:11].expand(3, 3, 11, 16)  # what attends to one-hots shows its weights
    got["attSm"] = attention.reference(q, k, one_hot)[..., :11]
    heads = attention.attention(q, k, v)
    close(heads, attention.reference(q, k, v), 1e-5)
    got["y"] = heads.transpose(1, 2).flatten(2)
    got["yProj"] = fgpt.linear(got["y"], p.attn.o.w, p.attn.o.b)
    got["attnResid"] = got["x"] + got["yProj"]
    got["ln2"] = forward.norm(got["attnResid"], p.ln_2, cfg.norm_eps)
    got["fc"] = fgpt.linear(got["ln2"], p.mlp.up.w, p.mlp.up.b)
    got["gelu"] = F.gelu(got["fc"], approximate="tanh")
    got["mlp"] = fgpt.linear(got["gelu"], p.mlp.down.w, p.mlp.down.b)
    got["mlpResid"] = got["attnResid"] + got["mlp"]
    h = got["x"]
    for i, block in enumerate(params.blocks):
        h, _ = forward.block(h, block, cfg)
        got[f"block{i}"] = h
    got["ln_f"] = fgpt.hidden(params, x)
    got["lm_head"] = fgpt.apply(params, x)
    got["probs"] = got["lm_head"].softmax(-1)
    assert got.keys() == expected.keys()
    close(got, expected, 1e-5)


def test_the_sorting_model_sorts(shared_data: SharedData):
    params = fgpt.load(str(shared_data("gpt-nano-sort")))
    prompts = torch.cartesian_prod(*[torch.arange(3)] * 6)[::7]
    generated = fgpt.generate(params, prompts.tolist(), eos_token_id=-1, max_new_tokens=5)
    assert torch.equal(torch.tensor([g.tokens for g in generated]), prompts.sort(-1).values[:, :5])


# -------------------------------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_the_gradients_of_a_norm_are_not_summed_in_half_precision(kind: str, dtype: torch.dtype):
    rng = fgpt.key(0)
    x, g = (torch.randn(4096, 16, generator=rng).to(dtype) for _ in range(2))
    w, b = torch.rand(16, generator=rng).to(dtype), torch.randn(16, generator=rng).to(dtype)

    def total(wb: tuple[Tensor, Tensor], x: Tensor, g: Tensor) -> Tensor:
        p = M.Norm(*wb) if kind == "layer" else M.RMSNorm(wb[0])
        return (forward.norm(x, p, 1e-5).to(torch.float64) * g.to(torch.float64)).sum()

    plain = (w.clone().requires_grad_(), b.clone().requires_grad_())
    y = x.double() - x.double().mean(-1, keepdim=True) if kind == "layer" else x.double()
    y = y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    true = (g.double() * y).sum(0), g.double().sum(0) * (kind == "layer")
    halves = (x.unflatten(0, (2, -1)), g.unflatten(0, (2, -1)))
    for found in (
        torch.autograd.grad(total(plain, x, g), plain, materialize_grads=True),
        torch.func.grad(total)((w, b), x, g),
        [t.double().sum(0) for t in torch.func.vmap(torch.func.grad(total), in_dims=(None, 0, 0))((w, b), *halves)],
    ):
        for got, expected in zip(found, true, strict=True):
            assert (got.double() - expected).norm() <= 5e-3 * expected.norm()


# --------------------------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradients_of_an_embedding_are_not_summed_in_half_precision(dtype: torch.dtype):
    """Of three tokens that stand at 4,096 places, with the values that torch's own reading has."""
    table, g = (
        torch.randn(5, 16, generator=fgpt.key(0)).to(dtype),
        torch.rand(4096, 16, generator=fgpt.key(1)).to(dtype),
    )
    text = tokens(3, 4096)
    true = F.one_hot(text, 5).double().T @ g.double()

    def total(table: Tensor, text: Tensor, g: Tensor) -> Tensor:
        return (fgpt.embed(text, table).double() * g.double()).sum()

    trained = table.clone().requires_grad_()
    assert torch.equal(fgpt.embed(text.view(2, -1), trained), F.embedding(text.view(2, -1), table))
    halves = (text.view(2, -1), g.unflatten(0, (2, -1)))
    for got in (
        torch.autograd.grad(total(trained, text, g), trained)[0],
        torch.func.grad(total)(table, text, g),
        torch.func.vmap(torch.func.grad(total), in_dims=(None, 0, 0))(table, *halves).double().sum(0),
    ):
        assert (got.double() - true).norm() <= 5e-3 * true.norm()


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


def test_a_row_longer_than_the_context_is_refused(gpt: fgpt.GPT):
    with pytest.raises(fgpt.InputError, match="25 tokens in a row, but the model's context is 24"):
        fgpt.apply(gpt, tokens(31, 1, 25))
    _, cache = fgpt.forward_with_cache(gpt, tokens(31, 1, 24), fgpt.KVCache())
    with pytest.raises(fgpt.InputError, match="25 tokens in a row"):
        fgpt.forward_with_cache(gpt, tokens(31, 1, 1), cache)


# ---------------------------------------------------------------------------------------------------------- generation


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
