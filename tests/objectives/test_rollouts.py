"""Rollouts are functions of their keys; equal rewards teach nothing; rewards are numbers."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import close, tiny, with_noise
from builders.hf_models import hf_model, save_and_load
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, grad_and_value

import fgpt
from fgpt.generation.loop import GenerationOutput
from fgpt.losses import token_nll
from fgpt.objectives.grpo import group_advantages, grpo
from fgpt.objectives.number_reward import final_number, number_reward
from fgpt.objectives.rollouts import group_rewards, rollout_batches, sample_groups, with_temperature

BASE = tiny(d_model=64, d_mlp=64)
ADAPTERS: Any = with_noise(fgpt.lora(BASE, fgpt.key(0), 2), seed=1)
PROMPTS = [[1, 2, 3], [4], [5, 6]]
EOS = 0


def sample(seed: int = 1, prompts: Any = PROMPTS, count: int = 4, length: int = 5) -> Any:
    return sample_groups(
        BASE, prompts, rng=fgpt.key(seed), num_generations=count, eos_token_id=EOS, max_new_tokens=length
    )


def as_text(tokens: list[int]) -> str:
    return " ".join(map(str, tokens))


@pytest.mark.slow
@given(st.integers(0, 99))
def test_a_key_reproduces_its_rollouts(seed: int):
    groups = sample(seed)
    assert groups == sample(seed)
    assert [len(group) for group in groups] == [4, 4, 4]
    assert groups != sample(seed + 1)
    assert len({as_text(answer.tokens) for answer in groups[1]}) > 1


def test_the_other_prompts_change_nothing():
    """Of a batch, the first group is that of its prompt alone."""
    assert sample(3)[0] == sample(3, PROMPTS[:1])[0]
    assert sample(3)[:2] == sample(3, PROMPTS[:2])


def test_an_answer_has_the_models_probability():
    """The share of first tokens of many answers is the softmax of the logits."""
    groups = sample(5, [[1, 2]], count=4000, length=1)
    firsts = [answer.tokens[0] if answer.tokens else EOS for answer in groups[0]]
    shares = torch.bincount(torch.tensor(firsts), minlength=BASE.cfg.vocab_size) / len(firsts)
    expected = fgpt.apply(BASE, torch.tensor([[1, 2]]))[0, -1].softmax(-1)
    close(shares, expected, 0.03)


@pytest.mark.parametrize("model", ["gpt2", "gptj", "llama"])
def test_a_temperature_divides_the_logits(model: str):
    params = with_noise(tiny(), seed=2) if model == "gpt2" else save_and_load(hf_model(model))
    text = torch.tensor([[1, 2, 3, 4]])
    close(fgpt.apply(with_temperature(params, 0.7), text), fgpt.apply(params, text) / 0.7, 1e-5, 1e-5)
    with pytest.raises(fgpt.InputError, match="temperature is 0"):
        with_temperature(params, 0.0)


def rollouts(advantages: torch.Tensor, micro_batch_size: int) -> Any:
    return rollout_batches(PROMPTS, sample(), advantages, eos_token_id=EOS, micro_batch_size=micro_batch_size)


def gradient(batches: Any) -> Any:
    return grad(lambda a: sum(grpo(fgpt.adapt(BASE, a), batch)[0] for batch in batches))(ADAPTERS)


def test_equal_rewards_give_no_gradient():
    rewards = torch.tensor([[1.0, 1, 1, 1], [0.25, 0.25, 0.25, 0.25], [0, 0, 0, 0]])
    still = gradient(rollouts(group_advantages(rewards), 12))
    assert all(not x.a.any() and not x.b.any() for x in still.values())
    rewards[0, 0] = 0.0
    moved = gradient(rollouts(group_advantages(rewards), 12))
    assert max(float(x.b.abs().max()) for x in moved.values()) > 1e-3


def test_micro_batches_are_their_union():
    advantages = torch.randn(3, 4, generator=fgpt.key(2))
    one, several = rollouts(advantages, 12), rollouts(advantages, 5)
    assert (len(one), len(several)) == (1, 3)
    close(gradient(one), gradient(several), 1e-5, 1e-5)


def test_the_weights_lie_on_the_answer_and_its_end():
    groups = [[GenerationOutput([7, 8], True, []), GenerationOutput([9], False, [])]]
    advantages = torch.tensor([[1.0, -1.0]])
    (x,) = rollout_batches([[1, 2, 3]], groups, advantages, eos_token_id=EOS, micro_batch_size=2, share_prompts=False)
    assert x.prompts is None
    assert x.advantages.tolist() == [-1.0, 1.0]  # the shorter one comes first
    assert x.batch.targets.tolist() == [[2, 3, 9, 0, 0], [2, 3, 7, 8, EOS]]
    assert x.batch.weights.tolist() == [[0, 0, 1, 0, 0], [0, 0, 1, 1, 1]]
    (x,) = rollout_batches([[1, 2, 3]], groups, advantages, eos_token_id=EOS, micro_batch_size=2)
    assert x.prompts is not None
    assert (x.prompts.tokens.tolist(), x.prompts.prompt_of_row.tolist()) == ([[1, 2]], [0, 0])
    assert x.advantages.tolist() == [1.0, -1.0]
    assert x.batch.tokens.tolist() == [[3, 7, 8], [3, 0, 0]]
    assert x.batch.targets.tolist() == [[7, 8, EOS], [9, 0, 0]]
    assert x.batch.weights.tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.slow
@given(st.data())
def test_shared_prompts_are_whole_rows(data: st.DataObject):
    """In value and gradient, whatever the lengths and however the groups are cut, with a reference and without."""
    prompts = data.draw(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=8), min_size=1, max_size=4))
    texts = st.tuples(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.booleans())
    groups = [
        [GenerationOutput(*answer, []) for answer in data.draw(st.lists(texts, min_size=1, max_size=4))]
        for _ in prompts
    ]
    advantages = [[0.5 * i - j + 1 for j in range(len(group))] for i, group in enumerate(groups)]
    size, beta, remat = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([0.0, 0.3])), data.draw(st.booleans())

    def value_and_gradient(share_prompts: bool) -> Any:
        batches = rollout_batches(
            prompts, groups, advantages, eos_token_id=EOS, micro_batch_size=size, share_prompts=share_prompts
        )
        assert all(batch.prompts is None for batch in batches) or share_prompts

        def total(adapters: Any) -> torch.Tensor:
            losses = torch.zeros(())
            for x in batches:
                reference = -token_nll(BASE, x.batch, prompts=x.prompts)[0].detach()
                losses = (
                    losses
                    + grpo(fgpt.adapt(BASE, adapters), replace(x, reference=reference), beta=beta, remat=remat)[0]
                )
            return losses

        return grad_and_value(total)(ADAPTERS)

    shared, whole = value_and_gradient(True), value_and_gradient(False)
    close(shared, whole, 2e-5, 1e-5)
    assert max(float(x.b.abs().max()) for x in shared[0].values()) > 0


def test_a_compiled_block_reads_no_shared_prompts():
    (batch,) = rollouts(torch.ones(3, 4), 12)
    with pytest.raises(fgpt.InputError, match="the compiled block reads no shared prompts: expected rows"):
        grpo(BASE, batch, compile=True)


def test_rewards_are_functions_of_the_text():
    groups = sample()
    rewards = group_rewards(lambda row, text, finished: len(text) + row + finished, [0, 100, 200], groups, as_text)
    expected = [[len(as_text(x.tokens)) + 100 * i + x.finished for x in group] for i, group in enumerate(groups)]
    assert rewards.tolist() == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "1", torch.ones(2)])
def test_a_reward_that_is_no_number_is_an_error(value: Any):
    with pytest.raises(fgpt.InputError, match="expected a finite number; fix the reward function"):
        group_rewards(lambda *_: value, [0, 0, 0], sample(), as_text)


def test_a_group_of_one_is_an_error():
    with pytest.raises(fgpt.InputError, match="num_generations is 1: expected 2 or more"):
        sample(count=1)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48/2 = 24. 48 + 24 = 72. #### 72", 72),
        ("#### 1\nNo: #### 2 of 3", 2),
        ("#### $1,234.50", 1234.5),
        ("The answer is 12,000.", 12000),
        ("He has 10-3 = 7 left.", 7),
        ("It is 10-3", 3),
        ("It fell to -5 degrees.", -5),
        ("That is 3/4 of it", 0.75),
        ("It costs .50", 0.5),
        ("#### none, though it was 5", 5),
        ("1/0", None),
        ("5 apples ####", None),
        ("no number", None),
        ("", None),
    ],
)
def test_final_numbers_by_hand(text: str, number: float | None):
    assert final_number(text) == number


def test_a_number_is_its_value():
    assert number_reward("#### 72", "It makes 72.0") == 1.0
    assert number_reward("#### 72", "It makes 72, or 73.") == 0.0
    assert number_reward("#### 72", "") == 0.0
    assert number_reward("no number", "no number") == 0.0
