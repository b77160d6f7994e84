"""Prompt tuning: new rows of the embedding stand before every text, and they alone are trained."""

from typing import Any

import peft
import pytest
import torch
from builders import close, same, tokens
from builders.adapters import three_steps
from builders.hf_models import hf_model, save_and_load
from torch.nn import functional as F

import fgpt
from fgpt.tree import leaves, tree_map
from fgpt.vocabulary import with_rows

TEXT = tokens(31, 2, 7)
IDS = (31, 32, 33, 34)
"""The rows after the vocabulary, which no text has."""
PROMPTED = torch.cat([torch.tensor(IDS).expand(2, -1), TEXT], dim=1)


@pytest.mark.parametrize("name", ["gptj", "llama", "llama, tied"])
def test_logits_and_gradients_are_those_of_pefts_prompt_tuning(name: str) -> None:
    model: Any = peft.get_peft_model(hf_model(name), peft.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=4))  # pyright: ignore
    prompt = model.prompt_encoder["default"].embedding.weight
    theirs = model(input_ids=TEXT).logits
    F.cross_entropy(theirs[:, 3:-1].flatten(0, 1), TEXT.flatten()).backward()
    params = with_rows(save_and_load(hf_model(name)), 35)
    adapters: Any = {"wte": fgpt.TrainableTokens(prompt.detach(), IDS)}

    def loss(adapters: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits = fgpt.functional_call(fgpt.apply, (params, adapters), PROMPTED)[..., :31]
        return F.cross_entropy(logits[:, 3:-1].flatten(0, 1), TEXT.flatten()), logits

    grads, logits = torch.func.grad(loss, has_aux=True)(adapters)
    close(logits, theirs.detach(), 1e-4)
    close(grads["wte"].rows, prompt.grad, 1e-5)
    assert prompt.grad.abs().max() > 1e-3


def test_prompt_tuning_of_new_tokens_from_the_tokenizer_on() -> None:
    params, tokenizer, ids = fgpt.add_tokens(
        fgpt.load("nano"), fgpt.tokenizer("nano"), [f"<|prompt{i}|>" for i in range(4)]
    )
    text = tokenizer.encode("Once upon a time")
    row = torch.tensor([[*ids, *text]])
    is_text = (torch.arange(row.shape[1] - 1) >= len(ids) - 1).float()[None]  # the first prediction is of the text
    batch = fgpt.Batch(row[:, :-1], row[:, 1:], is_text)
    before = tree_map(torch.clone, params)
    adapters: Any = fgpt.trainable_tokens(params, ids, target="wte")
    assert fgpt.num_trainable(adapters) == 4 * params.cfg.d_model
    trained, losses = three_steps(params, adapters, batch)
    assert losses == sorted(losses, reverse=True)
    assert same(params, before)
    assert list(leaves(trained)) == ["wte.rows"]
