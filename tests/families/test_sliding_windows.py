"""Sliding windows, in every kind of cache and under transforms."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders import close, tokens, with_noise
from builders.hf_models import VARIANTS, hf_model, save_and_load

import fgpt
from fgpt.generation import static_cache
from fgpt.tree import leaves, tree_map


def test_a_mistral_without_a_window_is_a_llama(tmp_path: Path):
    """As those since version 0.2 are: it is saved as what it is."""
    model, x = hf_model("mistral", sliding_window=None), tokens(31, 2, 20)
    params = save_and_load(model)
    assert params.cfg.sliding_window is None
    fgpt.save(params, tmp_path)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(x).logits
        assert torch.equal(reloaded(x).logits, expected)
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
