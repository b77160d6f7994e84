"""Every family is transformers' model of it: logits, text, files."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders import close, same, tokens
from builders.hf_models import VARIANTS, hf_model, save_and_load
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import fgpt
from fgpt import families
from fgpt import model as M
from fgpt.tree import num_elements


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_transformers(name: str):
    model, x = hf_model(name), tokens(31, 2, 20)
    params = save_and_load(model)
    with torch.no_grad():
        expected = model(x).logits
    close(fgpt.apply(params, x), expected, 1e-5)
    close(fgpt.apply(M.fuse_qkv(params), x), expected, 1e-5)
    assert num_elements(params) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=3)
@given(data=st.data())
def test_padded_and_packed_rows_are_transformers(name: str, data: st.DataObject):
    """A padded row gives its text what it has alone, and a packed one each document what it has alone."""
    lengths = data.draw(st.lists(st.integers(1, 8), min_size=2, max_size=3))
    model = hf_model(name, data.draw(st.integers(0, 99)))
    params, width = save_and_load(model), max(lengths)
    texts = [tokens(31, 1, n, seed=i) for i, n in enumerate(lengths)]
    with torch.no_grad():
        alone = [model(x).logits[0] for x in texts]
    packed = torch.cat(texts, 1)
    segments = torch.tensor([[i for i, n in enumerate(lengths, 1) for _ in range(n)]])
    close(fgpt.apply(params, packed, segments)[0], torch.cat(alone), 1e-5)
    for left in (True, False):
        rows = [[0] * (width - n) + [1] * n if left else [1] * n + [0] * (width - n) for n in lengths]
        x, text = torch.zeros(len(lengths), width, dtype=torch.long), torch.tensor(rows)
        x[text.bool()] = packed[0]
        close(fgpt.apply(params, x, text)[text.bool()], torch.cat(alone), 1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_any_chunking_is_one_pass_and_greedy_text_is_transformers(name: str):
    model = hf_model(name)
    params, x = save_and_load(model), tokens(31, 2, 13)
    whole, cache, parts = fgpt.hidden(params, x), fgpt.KVCache(), []
    for a, b in ((0, 1), (1, 7), (7, 8), (8, 13)):
        h, cache = fgpt.forward_with_cache(params, x[:, a:b], cache)
        parts.append(h)
    close(torch.cat(parts, 1), whole, 1e-5)
    prompts = [tokens(31, n, seed=n).tolist() for n in (3, 9)]
    together = fgpt.generate(params, prompts, eos_token_id=0, max_new_tokens=10)
    for prompt, got in zip(prompts, together, strict=True):
        ids = torch.tensor([prompt])
        options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "eos_token_id": 0, "pad_token_id": 0}
        generated = model.generate(ids, do_sample=False, max_new_tokens=10, **options)[0, len(prompt) :].tolist()
        assert got.tokens == (generated[: generated.index(0)] if 0 in generated else generated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_load_then_save_is_the_identity(name: str, dtype: torch.dtype, tmp_path: Path):
    """Bitwise, by name; config and all, so that transformers reads the folder as its own."""
    model, x = hf_model(name).to(dtype), tokens(31, 2, 20)
    model.save_pretrained(tmp_path / "theirs")
    params = fgpt.load(str(tmp_path / "theirs"), dtype=None)
    fgpt.save(M.fuse_qkv(params), tmp_path / "ours")
    old, new = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert same(old, new)
    assert same(fgpt.load(str(tmp_path / "ours"), dtype=None), params)
    first, second = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / side, attn_implementation="eager").eval()
        for side in ("theirs", "ours")
    )
    assert type(second) is type(model)
    assert second.dtype == dtype
    with torch.no_grad():
        assert torch.equal(second(x).logits, first(x).logits)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_config_has_one_family_that_gives_it_back(name: str):
    cfg = save_and_load(hf_model(name)).cfg
    family = families.family_of(cfg)
    assert type(hf_model(name).config).model_type in family.model_types
    assert family.config_from_hf(family.config_to_hf(cfg)) == cfg
    assert families.family_of(fgpt.Config(2, 2, 8, 9, 10, 32)) is families.GPT2


@pytest.mark.parametrize("name", ["gptj", "neox", "llama", "qwen3"])
@pytest.mark.parametrize("to", ["nf4", "int8"])
def test_quantizing_while_loading_is_quantizing_afterwards(name: str, to: Any, tmp_path: Path):
    sizes = (
        {"n_embd": 64, "n_inner": 64}
        if name == "gptj"
        else {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    )
    hf_model(name, **{k: x for k, x in sizes.items() if k != "head_dim" or name != "neox"}).save_pretrained(
        tmp_path, max_shard_size="20KB"
    )
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    for dtype in (torch.float32, torch.bfloat16):
        params = fgpt.load(str(tmp_path), dtype)
        for target in (r"blocks\..*", r"blocks\.\d\.mlp\..*|wte"):
            got = fgpt.load(str(tmp_path), dtype, quantize=to, target=target)
            assert same(got, fgpt.quantize(params, to, target=target))
    fgpt.save(got, tmp_path / "again")
    assert same(fgpt.load(str(tmp_path / "again"), dtype), got)
