"""Every family is transformers' model of it: logits, text, files; and what a bad folder says."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders import close, hf_gpt2, same, tokens, with_noise
from builders.hf_models import LLAMA_3, VARIANTS, YARN, hf_model, save_and_load, write_hf_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import ACT2FN

import fgpt
from fgpt import families
from fgpt import model as M
from fgpt.families import hf_config, mapping
from fgpt.generation import static_cache
from fgpt.io import models
from fgpt.tree import leaves, num_elements, tree_map


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
        written = model.generate(ids, do_sample=False, max_new_tokens=10, **options)[0, len(prompt) :].tolist()
        assert got.tokens == (written[: written.index(0)] if 0 in written else written)


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
    first, again = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / side, attn_implementation="eager").eval()
        for side in ("theirs", "ours")
    )
    assert type(again) is type(model)
    assert again.dtype == dtype
    with torch.no_grad():
        assert torch.equal(again(x).logits, first(x).logits)


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


# ------------------------------------------------------------------------------------------- windows, ropes and scores


def test_a_mistral_without_a_window_is_a_llama(tmp_path: Path):
    """As those since version 0.2 are: it is saved as what it is."""
    model, x = hf_model("mistral", sliding_window=None), tokens(31, 2, 20)
    params = save_and_load(model)
    assert params.cfg.sliding_window is None
    fgpt.save(params, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(x).logits
        assert torch.equal(again(x).logits, expected)
    close(fgpt.apply(params, x), expected, 1e-5)


WINDOWED = [name for name in VARIANTS if "mistral" in name or "window" in name]


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_holds_in_every_kind_of_cache(name: str):
    """Past the window: a cache that grows, and one with room, for ragged rows and for rows of one length."""
    params, x = save_and_load(hf_model(name)), tokens(31, 3, 20)
    whole = fgpt.apply(params, x)
    for segments, first in ((None, 1), (torch.ones_like(x), 3), (None, 9)):
        begun = None if segments is None else segments[:, :first]
        scores, room = static_cache.prefill(params, x[:, :first], begun, 20 - first)
        steps = [scores, *(static_cache.decode_step(params, x[:, i], room) for i in range(first, 20))]
        close(torch.stack(steps, 1), whole[:, first - 1 :], 1e-5)
    left = torch.tensor([0, 2, 7])  # places of padding
    ragged = torch.stack([torch.cat([x.new_zeros(n), x[i, : 12 - n]]) for i, n in enumerate(left.tolist())])
    scores, room = static_cache.prefill(params, ragged, (torch.arange(12) >= left[:, None]).long(), 4)
    for step in range(4):
        after = 11 - left + step
        close(scores, whole[torch.arange(3), after], 1e-5)
        scores = static_cache.decode_step(params, x[torch.arange(3), after + 1], room)


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_under_transforms_is_the_one_without(name: str):
    """The mask is all that changes: gradients, vmap, jvp and remat are those of one pass."""
    params, x = save_and_load(hf_model(name)), tokens(31, 2, 12)
    adapters = with_noise(fgpt.lora(params, fgpt.key(0), 2))

    def loss(a: Any, row: torch.Tensor, **options: Any) -> torch.Tensor:
        h = fgpt.hidden(fgpt.adapt(params, a), row, **options)
        return fgpt.logits(params, h).log_softmax(-1)[..., 3].mean()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(adapters, x)
    mean = torch.func.grad(loss)(adapters, x)
    close(tree_map(lambda g: g.mean(0), each), mean, 1e-5)
    close(torch.func.grad(lambda a: loss(a, x, remat=True))(adapters), mean, 1e-6)
    slope = torch.func.jvp(lambda a: loss(a, x), (adapters,), (mean,))[1]
    expected = sum((g * g).sum() for g in leaves(mean).values())
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-7)


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
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        close(again(x).logits, expected, 1e-6)
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
    own = {"factor": 2.0} | {k: x for k, x in (LLAMA_3 if rope == "llama3" else YARN).items() if k[:4] != "rope"}
    own = {} if rope == "default" else {"factor": 2.0} if rope in ("linear", "dynamic") else own
    theta = {"rope_theta": 300.0}
    config = {"rope_parameters": None, fields: {kind: rope, **own, **(theta if fields == "rope_parameters" else {})}}
    config |= theta if fields == "rope_scaling" else {}
    folder = write_hf_folder(tmp_path / "it", "llama", **config)
    model, x = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval(),
        tokens(31, 2, 20),
    )
    assert model.config.rope_parameters["rope_type"] == rope
    with torch.no_grad():
        close(fgpt.apply(fgpt.load(str(folder)), x), model(x).logits, 1e-5)


SCORES = [
    {"scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
    {"reorder_and_upcast_attn": True},
    {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
]


@pytest.mark.parametrize("fields", SCORES)
def test_scaled_scores_are_transformers(fields: dict[str, bool], tmp_path: Path):
    """In one pass, in text, with blocks fused and recomputed; and a folder that is saved says so."""
    model, x = hf_gpt2(n_layer=3, **fields), tokens(31, 2, 20)
    model.save_pretrained(tmp_path / "theirs")
    params = fgpt.load(str(tmp_path / "theirs"))
    with torch.no_grad():
        expected = model(x).logits
    close(fgpt.apply(params, x), expected, 1e-5)
    close(fgpt.apply(M.fuse_qkv(params), x), expected, 1e-5)
    close(fgpt.logits(params, fgpt.hidden(params, x, remat=True)), expected, 1e-5)
    scores, room = static_cache.prefill(params, x[:, :1], None, 19)
    steps = [scores, *(static_cache.decode_step(params, x[:, i], room) for i in range(1, 20))]
    close(torch.stack(steps, 1), expected, 1e-5)
    fgpt.save(params, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    with torch.no_grad():
        close(again(x).logits, expected, 1e-6)
    assert same(fgpt.load(str(tmp_path / "ours")), params)


NEW = ("mistral", "qwen3, a window in one layer", "qwen2, yarn, every field", "neox, yarn")


@pytest.mark.parametrize("name", NEW)
def test_quantized_trees_keep_windows_and_ropes(name: str, tmp_path: Path):
    params = fgpt.quantize(save_and_load(hf_model(name)), "int8")
    fgpt.save(params, tmp_path)
    again = fgpt.load(str(tmp_path))
    assert again.cfg == params.cfg
    assert same(again, params)


# ---------------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("name", hf_config.ACTIVATIONS)
def test_activations_are_transformers(name: str):
    """The function, its slope, and a model of it; gelu_10 and the like are other functions, and are refused."""
    x = torch.linspace(-12, 12, 4801, dtype=torch.float64, requires_grad=True)
    function: Any = ACT2FN[name]
    mine, wanted = M.ACTIVATIONS[hf_config.ACTIVATIONS[name]](x), function(x)
    close(mine, wanted, 1e-9)
    (slope,), (expected,) = (torch.autograd.grad(y.sum(), x) for y in (mine, wanted))
    close(slope, expected, 1e-9)
    model, x = hf_model("neox", hidden_act=name), tokens(31, 2, 20)
    with torch.no_grad():
        close(fgpt.apply(save_and_load(model), x), model(x).logits, 1e-5)
    with pytest.raises(fgpt.InputError, match="hidden_act='gelu_10' is not supported"):
        hf_config.activation({"hidden_act": "gelu_10"}, "hidden_act", "gelu")


# ------------------------------------------------------------------------------------------------------- head and table


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
        index(folder, {x: file for file, part in files.items() for x in part})
    for file, part in files.items():
        save_file(part, folder / file, {"format": "pt"})
    return str(folder)


def moved(tensors: dict[str, torch.Tensor], table: str, head: str) -> None:
    tensors[head] += 0.1 * torch.randn(tensors[head].shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("name", TIED)
def test_a_head_that_has_come_apart_is_kept(name: str, shards: bool, tmp_path: Path):
    """As transformers keeps it; and a folder that is saved again says that the two are two."""
    folder, x = tied(name, tmp_path / "apart", moved, shards=shards), tokens(31, 2, 20)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(x).logits
    params = fgpt.load(folder)
    assert not params.cfg.tie_word_embeddings
    close(fgpt.apply(params, x), expected, 1e-5)
    fgpt.save(params, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is False
    assert same(fgpt.load(str(tmp_path / "again")), params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(again(x).logits, expected)
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

    def biased(tensors: dict[str, torch.Tensor], table: str, head: str) -> None:
        tensors["lm_head.bias"] = torch.ones(31)

    with pytest.raises(fgpt.InputError, match=r"tensor lm_head\.weight: expected shape \[31, 32\], got \[30, 32\]"):
        fgpt.load(tied("llama, tied", tmp_path / "shorter", shorter))
    with pytest.raises(fgpt.InputError, match=r"tensor lm_head\.bias has no place"):
        fgpt.load(tied("gpt2", tmp_path / "biased", biased))


# ---------------------------------------------------------------------------------------------------------------- sizes


def test_gptjs_numbers():
    """Of the model, and of what the 8-bit GPT-J of its day trained."""
    params = M.abstract_params(families.GPTJ.config_from_hf(transformers.GPTJConfig().to_dict()))
    assert num_elements(params) == 6_050_882_784
    rest = fgpt.trainable_leaves(params, r".*ln_.*|.*\.b")
    attention = fgpt.lora(params, fgpt.key(0), 2, target=r"blocks\..*\.(q|k|v|o)")
    linears = fgpt.lora(params, fgpt.key(0), 2, target=r"wte|head|blocks\..*")
    assert num_elements(rest) == 861_408
    assert num_elements(attention | rest) == 2_696_416
    assert num_elements(linears | rest) == 5_208_160


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("llama", {"model_type": "bloom"}, r"model_type is 'bloom', expected one of gpt2, gptj.*fgpt\.lift"),
        ("llama", {"hidden_size": None}, "expected integers above 0 for hidden_size"),
        ("llama", {"vocab_size": -3}, "expected integers above 0 for vocab_size"),
        ("llama", {"hidden_act": "relu6"}, "hidden_act='relu6' is not supported, expected one of gelu_new"),
        ("llama", {"rope_parameters": {"rope_type": "su"}}, "rope_type='su' is not supported, expected one of default"),
        ("llama", {"rope_parameters": YARN | {"rope_theta": 1}}, "yarn needs rope_theta above 1"),
        ("llama", {"rope_parameters": YARN | {"beta_fast": "32"}}, "a number from 0 to 1e15 for beta_fast, got '32'"),
        ("llama", {"rope_parameters": {"type": "dynamic"}}, "of type 'dynamic' lacks a number for 'factor'"),
        ("llama", {"rope_parameters": {"type": "dynamic", "factor": 0.5}}, "wants a factor of 1 or more"),
        ("llama", {"rope_parameters": {"type": "dynamic", "factor": 1e9}}, "wants a factor of 1 or more, up to"),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "of type 'llama3' lacks a number for 'factor'"),
        ("llama", {"num_key_value_heads": 3}, "4 heads of q do not divide among 3 of k and v"),
        ("llama", {"num_hidden_layers": 3}, r"tensor layers\.2\.\S+ is missing \(9 in all\): not a whole model"),
        ("llama", {"num_hidden_layers": 1}, r"tensor layers\.1\.\S+ has no place .* \(9 in all\)"),
        ("llama", {"intermediate_size": 48}, r"mlp\.gate_proj\.weight: expected shape \[48, 32\], got \[40, 32\]"),
        ("llama", {"tie_word_embeddings": True, "vocab_size": 30}, r"embed_tokens\.weight: expected shape \[30, 32\]"),
        ("llama", {"attention_bias": True}, r"self_attn\.\w_proj\.bias is missing \(8 in all\)"),
        ("qwen2", {"use_sliding_window": "yes"}, "expected true or false for use_sliding_window, got 'yes'"),
        (
            "qwen2",
            {"layer_types": ["sliding_attention"] * 2},
            "layer_types other than 'full_attention' need a sliding_w",
        ),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types .* one for each of 2 layers, are not supported"),
        (
            "qwen3",
            {"layer_types": ["linear_attention"] * 2},
            "layer_types other than 'full_attention' and 'sliding_att",
        ),
        ("mistral", {"sliding_window": 0}, "expected integers above 0 for sliding_window"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "not supported in a Mistral that has a window"),
        ("gptj", {"rotary_dim": 7}, "7 rotated components of a head of 16"),
        ("gptj", {"tie_word_embeddings": True}, "tie_word_embeddings=True is not supported"),
        ("neox", {"attention_bias": False}, "attention_bias=False is not supported"),
        ("neox", {"num_attention_heads": 5}, "d_model 32 does not divide into 5 heads"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(name: str, changes: dict[str, Any], says: str, tmp_path: Path):
    with pytest.raises(fgpt.InputError, match=says) as caught:
        fgpt.load(str(write_hf_folder(tmp_path, name, **changes)))
    assert str(tmp_path) in str(caught.value)


def test_nothing_is_read_before_all_of_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A shape that is wrong in the last shard is told before a number of the first is read."""
    hf_model("llama").save_pretrained(tmp_path, max_shard_size="4KB")
    last = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    save_file({name: x[:1].clone() for name, x in load_file(last).items()}, last, {"format": "pt"})
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: pytest.fail("allocated") if "device" not in k else EMPTY(*a, **k)
    )
    with pytest.raises(fgpt.InputError, match=r"expected shape \[\d+(, \d+)?\], got \[1(, \d+)?\]"):
        fgpt.load(str(tmp_path))


EMPTY = torch.empty


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda f: (f / "model-00001.safetensors").unlink(),
            r"index\.json names model-00001\.safetensors, which is not",
        ),
        (lambda f: index(f, {"a": "../b"}), r"names \.\./b, which is not beside it"),
        (lambda f: index(f, {}), "expected a weight_map of tensor names to file names"),
        (lambda f: index(f, [1]), "expected a weight_map"),
        (lambda f: cut(f / "model-00002.safetensors", 100), r"model-00002\.safetensors: not a whole safetensors file"),
        (lambda f: cut(f / "model-00001.safetensors", 4), r"model-00001\.safetensors: not a whole safetensors file"),
        (lambda f: twice(f), r"model-00002\.safetensors: tensor \S+ is in another shard too"),
    ],
    ids=["gone", "elsewhere", "empty", "no map", "cut", "cut early", "twice"],
)
def test_spoiled_shards_are_refused(spoil: Any, says: str, tmp_path: Path):
    tensors = {name: x.clone() for name, x in hf_model("llama").state_dict().items()}
    hf_model("llama").config.save_pretrained(tmp_path)
    names = sorted(tensors)
    where = {name: f"model-0000{1 + i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({n: tensors[n] for n in names if where[n] == file}, tmp_path / file, {"format": "pt"})
    index(tmp_path, where)
    fgpt.load(str(tmp_path))
    spoil(tmp_path)
    with pytest.raises(fgpt.InputError, match=says):
        fgpt.load(str(tmp_path))


def index(folder: Path, where: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def twice(folder: Path) -> None:
    first, second = (load_file(folder / f"model-0000{i}.safetensors") for i in (1, 2))
    name = min(first)
    save_file(second | {name: first[name]}, folder / "model-00002.safetensors", {"format": "pt"})


# --------------------------------------------------------------------------------------------------------------- memory


class Made(TorchDispatchMode):
    """The most bytes that a new tensor of a dtype took."""

    def __init__(self) -> None:
        super().__init__()
        self.most: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not out.is_meta:
            self.most[out.dtype] = max(self.most.get(out.dtype, 0), out.nbytes)
        return out


def test_a_bf16_file_is_loaded_without_an_fp32_copy(tmp_path: Path):
    hf_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    with Made() as made:
        params = fgpt.load(str(tmp_path), torch.bfloat16)
    assert torch.float32 not in made.most
    assert made.most[torch.bfloat16] == max(x.nbytes for x in leaves(params).values())
    with Made() as made:  # and quantized, with one of the largest matrix at most
        fgpt.load(str(tmp_path), torch.bfloat16, quantize="int8")
    assert made.most[torch.float32] <= 4 * params.blocks[0].mlp.up.w.numel()  # pyright: ignore[reportAttributeAccessIssue]


def test_one_tensor_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What was read is let go of before the next is read, where it is not what is kept."""
    hf_model("gptj").half().save_pretrained(tmp_path)
    alive: list[weakref.ref[torch.Tensor]] = []
    read = models.lazy_tensors

    def watched(path: Path) -> dict[str, mapping.LazyTensor]:
        def one(held: mapping.LazyTensor) -> mapping.LazyTensor:
            def reader() -> Any:
                assert not [x for ref in alive if (x := ref()) is not None]
                x = held.read()
                alive.append(weakref.ref(x))  # pyright: ignore[reportArgumentType]
                return x

            return mapping.LazyTensor(held.shape, reader)

        return {name: one(x) for name, x in read(path).items()}

    monkeypatch.setattr(models, "lazy_tensors", watched)
    fgpt.load(str(tmp_path))
    assert len(alive) > 20
