"""Heads that are tied to the table, and heads that have come apart."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders import close, hf_gpt2, same, tokens, with_noise
from builders.hf_models import VARIANTS, hf_model, write_shard_index
from safetensors.torch import load_file, save_file

import fgpt

TIED = ("gpt2", *(name for name in VARIANTS if name.endswith("tied")))


HEADS = {"gpt2": "lm_head.weight", "neox, tied": "embed_out.weight"}


def tied(name: str, folder: Path, change: Any, **options: Any) -> str:
    """A folder whose config says tied; its tensors are those that `change` makes of those with a head that is equal."""
    model = hf_gpt2() if name == "gpt2" else hf_model(name)
    model.config.tie_word_embeddings = True
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    table = next(x for x in tensors if x.endswith(("wte.weight", "embed_in.weight", "embed_tokens.weight")))
    head = HEADS.get(name, "lm_head.weight")
    tensors[head] = tensors[table].clone()
    change(tensors, table, head)
    (folder / "model.safetensors").unlink()
    files = {"model.safetensors": tensors}
    if options.get("shards"):
        names = sorted(tensors, key=lambda x: x == head)  # the head is in another file than the table
        files = {f"model-{i}.safetensors": {x: tensors[x] for x in names[i::2]} for i in range(2)}
        write_shard_index(folder, {x: file for file, part in files.items() for x in part})
    for file, part in files.items():
        save_file(part, folder / file, {"format": "pt"})
    return str(folder)


def move_away(tensors: dict[str, torch.Tensor], table: str, head: str) -> None:
    tensors[head] += 0.1 * torch.randn(tensors[head].shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("name", TIED)
def test_a_head_that_has_come_apart_is_kept(name: str, shards: bool, tmp_path: Path):
    """As transformers keeps it; and a folder that is saved again says that the two are two."""
    folder, x = tied(name, tmp_path / "apart", move_away, shards=shards), tokens(31, 2, 20)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(x).logits
    params = fgpt.load(folder)
    assert not params.cfg.tie_word_embeddings
    close(fgpt.apply(params, x), expected, 1e-5)
    fgpt.save(params, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is False
    assert same(fgpt.load(str(tmp_path / "again")), params)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(reloaded(x).logits, expected)
    quantized = fgpt.load(folder, quantize="int8", target=r"head|blocks\..*")
    assert same(quantized, fgpt.quantize(params, "int8", target=r"head|blocks\..*"))
    adapters = with_noise(fgpt.lora(params, fgpt.key(0), target="head"))
    assert not torch.allclose(fgpt.apply(fgpt.adapt(params, adapters), x), expected, atol=1e-2)
    merged = fgpt.merge(fgpt.adapt(params, adapters))
    assert same(merged.wte, params.wte)  # the table is another matrix


@pytest.mark.parametrize("name", TIED)
def test_a_copy_of_the_table_is_tied(name: str, tmp_path: Path):
    """An equal head, and a head in the table's place, as safetensors' save_model leaves it, are one matrix."""
    both, x = tied(name, tmp_path / "both", lambda tensors, table, head: None), tokens(31, 2, 20)
    alone = tied(name, tmp_path / "alone", lambda tensors, table, head: tensors.pop(table))
    for folder in (both, alone):
        params = fgpt.load(folder)
        assert params.cfg.tie_word_embeddings
        assert params.head is None
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        with torch.no_grad():
            close(fgpt.apply(params, x), model(x).logits, 1e-5)


def test_a_head_that_fits_no_table_is_refused(tmp_path: Path):
    def shorter(tensors: dict[str, torch.Tensor], table: str, head: str) -> None:
        tensors[head] = tensors[head][:-1].clone()

    def with_head_bias(tensors: dict[str, torch.Tensor], table: str, head: str) -> None:
        tensors["lm_head.bias"] = torch.ones(31)

    with pytest.raises(fgpt.InputError, match=r"tensor lm_head\.weight: expected shape \[31, 32\], got \[30, 32\]"):
        fgpt.load(tied("llama, tied", tmp_path / "shorter", shorter))
    with pytest.raises(fgpt.InputError, match=r"tensor lm_head\.bias has no place"):
        fgpt.load(tied("gpt2", tmp_path / "biased", with_head_bias))
