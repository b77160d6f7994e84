"""Losses and gradients of preference objectives are those of TRL's trainers, on the same weights and rows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import close, hf_gpt2, load_hf_model
from builders.trl_trainers import batch_of, text, trainer
from torch.func import grad_and_value

import fgpt
from fgpt.objectives import dpo as dpo_file
from fgpt.objectives import kto as kto_file
from fgpt.objectives.orpo import odds_ratio_losses, orpo
from fgpt.objectives.pairs import PairBatch, with_reference
from fgpt.objectives.reward import bradley_terry
from fgpt.objectives.simpo import simpo

PROMPTS = [[1, 2, 3], [9], [4, 4]]
CHOSEN = [[4, 5, 6], [10], [7, 8, 9, 9, 2]]
REJECTED = [[7, 8], [11, 12, 13, 14], [3]]
PAIRS = PairBatch(batch_of([*zip(PROMPTS, CHOSEN, strict=True), *zip(PROMPTS, REJECTED, strict=True)]))
ROWS = [
    {"prompt": text(p), "chosen": f" {text(c)}", "rejected": f" {text(r)}"}
    for p, c, r in zip(PROMPTS, CHOSEN, REJECTED, strict=True)
]
SIZE: dict[str, Any] = {"bos_token_id": 30, "eos_token_id": 30}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(transformers' policy and reference, the same two as params)."""
    policy, reference = hf_gpt2(0, **SIZE), hf_gpt2(1, **SIZE)
    folder = tmp_path_factory.mktemp("models")
    return policy, reference, load_hf_model(policy, folder / "a"), load_hf_model(reference, folder / "b")


def agree(model: Any, their_loss: torch.Tensor, params: Any, loss: Any) -> None:
    """`loss(params)` -> (Σ, count) is their mean loss, in value and in gradient."""
    model.zero_grad()
    their_loss.backward()
    grads, value = grad_and_value(lambda p: (lambda total, count: total / count)(*loss(p)))(params)
    close(value, their_loss.detach(), 1e-5, 1e-5)
    block = model.transformer.h[0]
    size = float(block.mlp.c_fc.weight.grad.abs().max())
    close(grads.blocks[0].mlp.up.w / size, block.mlp.c_fc.weight.grad.T / size, 1e-5, 1e-5)
    close(grads.blocks[1].ln_1.w / size, model.transformer.h[1].ln_1.weight.grad / size, 1e-5, 1e-5)
    close(grads.wte.w / size, model.transformer.wte.weight.grad / size, 1e-5, 1e-5)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge", "robust"])
def test_dpo(loss_type: Any, models: Any, tmp_path: Path):
    from trl import DPOConfig, DPOTrainer

    model, reference, params, base = models
    smoothing = 0.1 if loss_type == "robust" else 0.0
    options: dict[str, Any] = {"beta": 0.3, "loss_type": [loss_type], "label_smoothing": smoothing}
    made, batch = trainer(DPOTrainer, DPOConfig, model, ROWS, tmp_path, ref_model=reference, **options)
    pairs = with_reference(base, PAIRS)

    def ours(p: Any) -> Any:
        return dpo_file.dpo(p, pairs, beta=0.3, loss_type=loss_type, label_smoothing=smoothing)

    agree(model, made._compute_loss(made.model, batch, False), params, ours)


def test_dpo_with_the_nll_of_the_chosen_answer(models: Any, tmp_path: Path):
    """Of one pair: TRL's mean is over the tokens of all chosen answers."""
    from trl import DPOConfig, DPOTrainer

    model, reference, params, base = models
    options: dict[str, Any] = {"beta": 0.3, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}
    made, batch = trainer(DPOTrainer, DPOConfig, model, ROWS[2:], tmp_path, ref_model=reference, **options)
    pairs = with_reference(base, PairBatch(batch_of([(PROMPTS[2], CHOSEN[2]), (PROMPTS[2], REJECTED[2])])))

    def ours(p: Any) -> Any:
        return dpo_file.dpo(p, pairs, beta=0.3, rpo_alpha=0.7)

    agree(model, made._compute_loss(made.model, batch, False), params, ours)


def test_orpo(models: Any, tmp_path: Path):
    """Of one pair whose prompt is one token: TRL's nll is that of prompt and answer, and the first token of a text is
    never predicted.
    """
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    model, _, params, _ = models
    made, batch = trainer(ORPOTrainer, ORPOConfig, model, ROWS[1:2], tmp_path, beta=0.3)
    pairs = PairBatch(batch_of([(PROMPTS[1], CHOSEN[1]), (PROMPTS[1], REJECTED[1])]))
    agree(model, made.get_batch_loss_metrics(made.model, batch)[0], params, lambda p: orpo(p, pairs, beta=0.3))
    chosen, rejected = -torch.rand(50, generator=fgpt.key(0)) * 9, -torch.rand(50, generator=fgpt.key(1)) * 9
    close(0.3 * odds_ratio_losses(chosen, rejected), -made.odds_ratio_loss(chosen, rejected)[0], 1e-5, 1e-5)


def test_simpo(models: Any, tmp_path: Path):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    model, _, params, _ = models
    options = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7, "cpo_alpha": 0.0}
    made, batch = trainer(CPOTrainer, CPOConfig, model, ROWS, tmp_path, **options)
    agree(model, made.get_batch_loss_metrics(made.model, batch)[0], params, lambda p: simpo(p, PAIRS, gamma=0.7))


def test_kto(models: Any, tmp_path: Path):
    from trl import KTOConfig, KTOTrainer

    model, reference, params, base = models
    labels = [True, False, True]
    rows = [
        {"prompt": text(p), "completion": f" {text(c)}", "label": label}
        for p, c, label in zip(PROMPTS, CHOSEN, labels, strict=True)
    ]
    options = {"beta": 0.3, "desirable_weight": 1.2, "train_sampling_strategy": "sequential"}
    made, batch = trainer(KTOTrainer, KTOConfig, model, rows, tmp_path, ref_model=reference, **options)

    def theirs(ids: str, mask: str) -> fgpt.Batch:
        weights = batch[mask][:, 1:].float().contiguous()
        return fgpt.Batch(batch[ids][:, :-1].contiguous(), batch[ids][:, 1:].contiguous(), weights)

    answers, others = theirs("input_ids", "completion_mask"), theirs("KL_input_ids", "KL_completion_mask")
    judged = kto_file.JudgedBatch(answers, torch.as_tensor(batch["label"]).bool(), mismatched=others)
    judged = kto_file.with_reference(base, judged)

    def ours(p: Any) -> Any:
        return kto_file.kto(p, judged, beta=0.3, desirable_weight=1.2)

    agree(model, made._compute_loss(made.model, batch, False), params, ours)


def test_a_reward_model(tmp_path: Path):
    from transformers import GPT2Config, GPT2ForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=24, vocab_size=31, num_labels=1, **SIZE)
    model: Any = GPT2ForSequenceClassification(config).eval()
    rows = [{"chosen": text(p + c), "rejected": text(p + r)} for p, c, r in zip(PROMPTS, CHOSEN, REJECTED, strict=True)]
    made, batch = trainer(RewardTrainer, RewardConfig, model, rows, tmp_path, center_rewards_coefficient=0.05)
    model.save_pretrained(tmp_path / "model")
    params = fgpt.load(str(tmp_path / "model"))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    last = torch.nn.functional.one_hot(mask.sum(1) - 1, ids.shape[1]).float()
    pairs = PairBatch(fgpt.Batch(ids, ids, last))
    agree(model, made.compute_loss(made.model, batch), params, lambda p: bradley_terry(p, pairs, center=0.05))
