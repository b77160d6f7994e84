"""Activations at the points of taps, and gradients with respect to them, are transformers'."""

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from builders import close, hf_gpt2, tokens
from builders.hf_models import hf_model, save_and_load
from torch import Tensor
from torch.func import grad

import fgpt

FAMILIES = ["gpt2", "gpt2, scaled by layer", "gptj", "neox", "neox, one after the other", "llama", "qwen3", "mistral"]
INSIDE: dict[str, dict[str, str]] = {
    "gpt2": {"attn": "attn", "o": "attn.c_proj", "ln_1": "ln_1", "ln_2": "ln_2", "mlp": "mlp", "down": "mlp.c_proj"},
    "gptj": {"attn": "attn", "o": "attn.out_proj", "ln_1": "ln_1", "mlp": "mlp", "down": "mlp.fc_out"},
    "neox": {
        "attn": "attention",
        "o": "attention.dense",
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "mlp": "mlp",
        "down": "mlp.dense_4h_to_h",
    },
    "llama": {
        "attn": "self_attn",
        "o": "self_attn.o_proj",
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "mlp": "mlp",
        "down": "mlp.down_proj",
    },
}
"""transformers' names of a block's modules; qwen3's and mistral's are llama's."""
BLOCKS = {"gpt2": "transformer.h", "gptj": "transformer.h", "neox": "gpt_neox.layers", "llama": "model.layers"}
LAST = {
    "gpt2": "transformer.ln_f",
    "gptj": "transformer.ln_f",
    "neox": "gpt_neox.final_layer_norm",
    "llama": "model.norm",
}
HEADS = {
    "gptj": {"q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj"},
    "llama": {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"},
    "mistral": {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"},
    "qwen3": {"q": "self_attn.q_norm", "k": "self_attn.k_norm", "v": "self_attn.v_proj"},
}


class Pair(NamedTuple):
    model: Any
    params: fgpt.GPT
    text: Tensor
    activations: dict[str, Tensor]
    """transformers', of one pass, by the paths of our points; its autograd knows them."""
    logits: Tensor


def module_names(name: str) -> str:
    family = name.split(",")[0]
    return "llama" if family in ("qwen3", "mistral") else family


def first(x: Any) -> Tensor:
    return x[0] if isinstance(x, tuple) else x


def pair_of(name: str) -> Pair:
    options = {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3} if "scaled" in name else {}
    model = hf_gpt2(**options) if name.startswith("gpt2") else hf_model(name)
    params, text, names = save_and_load(model), tokens(31, 2, 11), module_names(name)
    activations: dict[str, Tensor] = {}

    def output_at(path: str) -> Any:
        return lambda module, args, output: activations.update({path: first(output)})

    def input_at(path: str) -> Any:
        return lambda module, args: activations.update({path: args[0]})

    for i in range(params.cfg.n_layer):
        modules = {key: model.get_submodule(f"{BLOCKS[names]}.{i}.{x}") for key, x in INSIDE[names].items()}
        for key, module in modules.items():
            if key not in ("o", "down"):
                module.register_forward_hook(output_at(f"blocks.{i}.{key}"))
        modules["o"].register_forward_pre_hook(input_at(f"blocks.{i}.attn.z"))
        modules["down"].register_forward_pre_hook(input_at(f"blocks.{i}.mlp.neurons"))
        for key, x in HEADS.get(name, {}).items():
            model.get_submodule(f"{BLOCKS[names]}.{i}.{x}").register_forward_hook(output_at(f"blocks.{i}.attn.{key}"))
    out = model(text, output_hidden_states=True, output_attentions=True, use_cache=False)
    states = out.hidden_states
    activations |= {"embed": states[0], "ln_f": states[-1]}
    activations |= {f"blocks.{i}": states[i + 1] for i in range(params.cfg.n_layer - 1)}
    activations |= {f"blocks.{i}.attn.weights": x for i, x in enumerate(out.attentions)}
    return Pair(model, params, text, activations, out.logits)


def by_head(path: str, x: Tensor, like: Tensor) -> Tensor:
    """transformers' activation in the shape of ours: its heads lie side by side where ours have an axis."""
    if not path.endswith((".q", ".k", ".v", ".z")):
        return x
    batch, heads, seq, size = like.shape
    return x.reshape(batch, seq, heads, size).transpose(1, 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_activations(name: str):
    pair = pair_of(name)
    h, activations = fgpt.trace(pair.params, pair.text, target=".*")
    last = f"blocks.{pair.params.cfg.n_layer - 1}"
    theirs = {path: x.detach() for path, x in pair.activations.items()}
    points_per_block = 6 if "gptj" in name else 7
    expected = pair.params.cfg.n_layer * (points_per_block + 3 * (name in HEADS)) + 1 + pair.params.cfg.n_layer
    assert len(theirs) == expected
    for path, x in theirs.items():
        close(activations[path], by_head(path, x, activations[path]), 1e-5)
    close(fgpt.final_norm(pair.params, activations[last]), theirs["ln_f"], 1e-5)
    close(fgpt.logits(pair.params, h), pair.logits.detach(), 1e-5)
    for i in range(pair.params.cfg.n_layer):  # scores are those whose softmax the weights are
        weights = theirs[f"blocks.{i}.attn.weights"]
        scores = activations[f"blocks.{i}.attn.scores"].masked_fill(weights == 0, -torch.inf)
        close(scores.softmax(-1), weights, 1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_logit_lens(name: str):
    pair = pair_of(name)
    _, activations = fgpt.trace(pair.params, pair.text, target=r"embed|blocks\.\d+")
    norm, head = pair.model.get_submodule(LAST[module_names(name)]), pair.model.get_output_embeddings()
    states = ["embed", *(f"blocks.{i}" for i in range(pair.params.cfg.n_layer - 1))]
    with torch.no_grad():
        for path in states:
            lens = fgpt.logits(pair.params, fgpt.final_norm(pair.params, activations[path]))
            close(lens, head(norm(pair.activations[path])), 1e-5)
    last = activations[f"blocks.{pair.params.cfg.n_layer - 1}"]
    close(fgpt.logits(pair.params, fgpt.final_norm(pair.params, last)), pair.logits.detach(), 1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_with_respect_to_activations(name: str):
    """By zeros that are added in a tap; transformers' by autograd, at every point that its graph has."""
    pair = pair_of(name)
    direction = torch.randn(pair.logits.shape, generator=fgpt.key(2))
    theirs = torch.autograd.grad((direction * pair.logits.log_softmax(-1)).sum(), list(pair.activations.values()))
    _, activations = fgpt.trace(pair.params, pair.text, target=".*")
    zeros = {path: torch.zeros_like(x) for path, x in activations.items()}

    def loss(added: dict[str, Tensor]) -> Tensor:
        tap = fgpt.Tap(lambda path, x: x + added[path], target=".*")
        return (direction * fgpt.apply(pair.params, pair.text, tap=tap).log_softmax(-1)).sum()

    gradients = grad(loss)(zeros)
    for path, expected in zip(pair.activations, theirs, strict=True):
        size = float(expected.abs().max())
        assert size > 1e-4
        close(gradients[path] / size, by_head(path, expected, gradients[path]) / size, 1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gptj", "neox", "llama"])
def test_an_edit_is_that_of_a_hook(name: str):
    """The output of one MLP and the heads of one attention, replaced in transformers by hooks."""
    pair = pair_of(name)
    names, factor = module_names(name), torch.linspace(0.5, 2.0, 11)[:, None]
    block = f"{BLOCKS[names]}.1"
    removable = [
        pair.model.get_submodule(f"{block}.{INSIDE[names]['mlp']}").register_forward_hook(lambda m, a, y: y * factor),
        pair.model.get_submodule(f"{block}.{INSIDE[names]['o']}").register_forward_pre_hook(lambda m, a: (a[0] - 0.3,)),
    ]
    with torch.no_grad():
        expected = pair.model(pair.text).logits
    for hook in removable:
        hook.remove()
    edits = {"blocks.1.mlp": lambda x: x * factor, "blocks.1.attn.z": lambda x: x - 0.3}
    tap = fgpt.Tap(lambda path, x: edits[path](x), target=r"blocks\.1\.(mlp|attn\.z)")
    close(fgpt.apply(pair.params, pair.text, tap=tap), expected, 1e-5)
    assert (expected - pair.logits).abs().max() > 1e-2


def test_the_points_are_in_the_order_of_their_computation():
    pair = pair_of("llama")
    _, activations = fgpt.trace(pair.params, pair.text, target=".*")
    block = ["ln_1", "attn.q", "attn.k", "attn.v", "attn.scores", "attn.weights", "attn.z", "attn", "ln_2"]
    block += ["mlp.neurons", "mlp"]
    inside = [[*(f"blocks.{i}.{name}" for name in block), f"blocks.{i}"] for i in range(2)]
    assert list(activations) == ["embed", *itertools.chain(*inside), "ln_f"]
