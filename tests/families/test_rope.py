"""Rotary embeddings that grow with the context, by any spelling."""

from pathlib import Path

import pytest
import torch
import transformers
from builders import close, tokens
from builders.hf_models import LLAMA_3, YARN, hf_model, save_and_load, write_hf_folder

import fgpt

DYNAMIC = {"max_position_embeddings": 8, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}}


@pytest.mark.parametrize("name", ["llama", "mistral", "neox", "qwen2"])
@pytest.mark.parametrize("length", [3, 8, 9, 17, 24])
def test_a_dynamic_rope_is_transformers_in_one_pass(name: str, length: int, tmp_path: Path):
    """Of any length; a packed document is what it is alone, and so is a row among longer ones."""
    model, x = hf_model(name, **DYNAMIC), tokens(31, 2, length)
    params = save_and_load(model)
    with torch.no_grad():
        expected = model(x).logits
    close(fgpt.apply(params, x), expected, 1e-5)
    alone = tokens(31, 1, 5, seed=1)
    with torch.no_grad():
        model = hf_model(name, **DYNAMIC)  # transformers keeps the angles of the longest row that it has seen
        shorter = model(alone).logits
    if length + 5 <= 24:
        segments = torch.tensor([[1] * length + [2] * 5])
        packed = fgpt.apply(params, torch.cat([x[:1], alone], 1), segments)
        close(packed[:, :length], expected[:1], 1e-5)
        close(packed[:, length:], shorter, 1e-5)
    fgpt.save(params, tmp_path)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        close(reloaded(x).logits, expected, 1e-6)
    assert fgpt.load(str(tmp_path)).cfg == params.cfg


def test_a_dynamic_rope_keeps_no_keys_beyond_its_first_context():
    params = save_and_load(hf_model("llama", **DYNAMIC))
    x = tokens(31, 1, 12)
    whole, (h, cache) = fgpt.hidden(params, x[:, :8]), fgpt.forward_with_cache(params, x[:, :5], fgpt.KVCache())
    close(torch.cat([h, fgpt.forward_with_cache(params, x[:, 5:8], cache)[0]], 1), whole, 1e-5)
    for past, more in ((fgpt.KVCache(), x), (cache, x[:, 5:9])):
        with pytest.raises(
            fgpt.InputError, match=r"a dynamic rope rotates all keys anew beyond 8, .*: shorten the row"
        ):
            fgpt.forward_with_cache(params, more, past)
    with pytest.raises(fgpt.InputError, match="expected 1 to 7"):
        fgpt.generate(params, [x[0].tolist()], eos_token_id=-1, max_new_tokens=3)
    assert len(fgpt.generate(params, [x[0, :5].tolist()], eos_token_id=-1, max_new_tokens=9)[0].tokens) == 3
    with pytest.raises(fgpt.InputError, match="25 tokens in a row, but the model's context is 24"):
        fgpt.apply(params, tokens(31, 1, 25))


@pytest.mark.parametrize("fields", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("kind", ["rope_type", "type"])
@pytest.mark.parametrize("rope", ["default", "linear", "llama3", "yarn", "dynamic"])
def test_a_rope_by_any_spelling(rope: str, kind: str, fields: str, tmp_path: Path):
    """Of files of all years: theta among the fields or beside them, the kind by its old name or the new one."""
    original = {"factor": 2.0} | {k: x for k, x in (LLAMA_3 if rope == "llama3" else YARN).items() if k[:4] != "rope"}
    original = {} if rope == "default" else {"factor": 2.0} if rope in ("linear", "dynamic") else original
    theta = {"rope_theta": 300.0}
    config = {
        "rope_parameters": None,
        fields: {kind: rope, **original, **(theta if fields == "rope_parameters" else {})},
    }
    config |= theta if fields == "rope_scaling" else {}
    folder = write_hf_folder(tmp_path / "it", "llama", **config)
    model, x = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval(),
        tokens(31, 2, 20),
    )
    assert model.config.rope_parameters["rope_type"] == rope
    with torch.no_grad():
        close(fgpt.apply(fgpt.load(str(folder)), x), model(x).logits, 1e-5)
