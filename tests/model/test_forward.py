"""The model is GPT-2: against transformers and recorded activations."""

import base64
import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from builders import SharedData, close, hf_gpt2, load_hf_model, tokens
from hypothesis import given
from hypothesis import strategies as st
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
