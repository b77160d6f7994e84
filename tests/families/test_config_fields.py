"""Fields of a config: scaled scores, activations, GPT-J's numbers; what does not fit is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders import close, hf_gpt2, same, tokens
from builders.hf_models import YARN, hf_model, save_and_load, write_hf_folder
from transformers.activations import ACT2FN

import fgpt
from fgpt import families
from fgpt import model as M
from fgpt.families import hf_config
from fgpt.generation import static_cache
from fgpt.model import forward
from fgpt.tree import num_elements

# ------------------------------------------------------------------------------------------- windows, ropes and scores


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
    logits: list[torch.Tensor] = []
    for folder in ("ours", "theirs"):  # in fp64, which the upcast to fp32, a matter of rounding, does not allow
        exact: Any = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / folder, attn_implementation="eager", reorder_and_upcast_attn=False, dtype=torch.float64
        )
        with torch.no_grad():
            logits.append(exact.eval()(x).logits)
    close(*logits, 1e-6)
    assert same(fgpt.load(str(tmp_path / "ours")), params)


NEW = ("mistral", "qwen3, a window in one layer", "qwen2, yarn, every field", "neox, yarn")


@pytest.mark.parametrize("name", NEW)
def test_quantized_trees_keep_windows_and_ropes(name: str, tmp_path: Path):
    params = fgpt.quantize(save_and_load(hf_model(name)), "int8")
    fgpt.save(params, tmp_path)
    reloaded = fgpt.load(str(tmp_path))
    assert reloaded.cfg == params.cfg
    assert same(reloaded, params)


# ---------------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("name", hf_config.ACTIVATIONS)
def test_activations_are_transformers(name: str):
    """The function, its slope, and a model of it; gelu_10 and the like are other functions, and are refused."""
    x = torch.linspace(-12, 12, 4801, dtype=torch.float64, requires_grad=True)
    function: Any = ACT2FN[name]
    got, target = forward.ACTIVATIONS[hf_config.ACTIVATIONS[name]](x), function(x)
    close(got, target, 1e-9)
    (slope,), (expected,) = (torch.autograd.grad(y.sum(), x) for y in (got, target))
    close(slope, expected, 1e-9)
    model, x = hf_model("neox", hidden_act=name), tokens(31, 2, 20)
    with torch.no_grad():
        close(fgpt.apply(save_and_load(model), x), model(x).logits, 1e-5)
    with pytest.raises(fgpt.InputError, match="hidden_act='gelu_10' is not supported"):
        hf_config.activation({"hidden_act": "gelu_10"}, "hidden_act", "gelu")


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
        ("llama", {"model_type": "bloom"}, r"model_type is 'bloom', expected one of gpt2, gptj.*fgpt\.from_module"),
        ("llama", {"hidden_size": None}, "expected integers above 0 for hidden_size"),
        ("llama", {"vocab_size": -3}, "expected integers above 0 for vocab_size"),
        ("llama", {"hidden_act": "relu6"}, "hidden_act='relu6' is not supported, expected one of gelu_new"),
        ("llama", {"rope_parameters": {"rope_type": "su"}}, "rope_type='su' is not supported, expected one of default"),
        ("llama", {"rope_parameters": YARN | {"rope_theta": 1}}, "yarn needs rope_theta above 1"),
        ("llama", {"rope_parameters": YARN | {"beta_fast": "32"}}, "a number from 0 to 1e15 for beta_fast, got '32'"),
        ("llama", {"rope_parameters": {"type": "dynamic"}}, "of type 'dynamic' lacks a number for 'factor'"),
        ("llama", {"rope_parameters": {"type": "dynamic", "factor": 0.5}}, "needs a factor of 1 or more"),
        ("llama", {"rope_parameters": {"type": "dynamic", "factor": 1e9}}, "needs a factor of 1 or more, up to"),
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
