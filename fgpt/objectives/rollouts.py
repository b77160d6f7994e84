"""Rollouts: a group of sampled answers to each prompt, their rewards, and the batches that `grpo` learns from.

groups  = sample_groups(params, prompts, rng=key, num_generations=8, ..)       a function of params and key
rewards = group_rewards(reward, rows, groups, decode)                          a number for each text
batches = rollout_batches(prompts, groups, group_advantages(rewards), ..)      rows of prompt and answer
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt.distributed import ALONE, World, gather_objects
from fgpt.errors import InputError, short_repr
from fgpt.generation.loop import GenerationOutput, generate
from fgpt.generation.sampling import SamplingParams
from fgpt.losses import Batch
from fgpt.model import GPT, Norm
from fgpt.objectives.grpo import RolloutBatch
from fgpt.rng import fold_in

Groups: TypeAlias = list[list[GenerationOutput]]
"""The answers to each prompt."""
RewardFunction: TypeAlias = Callable[[Any, str, bool], float]
"""(row, answer, finished) -> reward: of the row that the prompt was made from, the text of an answer, and whether it
ended with an end-of-sequence token.
"""

SAMPLING = SamplingParams(temperature=1.0)
"""Samples of the policy itself: at another temperature its log-probabilities would be those of another policy."""


LARGEST_REWARD = 1e30
"""Of either sign: rewards are fp32, and squared."""


def with_temperature(params: GPT, temperature: float) -> GPT:
    """The policy whose logits are those of `params` divided by the temperature: what samples at 1 from it samples so
    from `params`, and its log-probabilities are those of the samples.

    Args:
        params: A model, adapted or not.
        temperature: Below 1, likely tokens become likelier.

    Raises:
        InputError: for a temperature that is not positive.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params, text = fgpt.init(config, fgpt.key(0)), torch.tensor([1, 2])
    >>> torch.allclose(fgpt.apply(with_temperature(params, 0.5), text), 2 * fgpt.apply(params, text), atol=1e-5)
    True
    """
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature is {temperature}: expected a positive number")
    norm, head = params.ln_f, params.head
    norm = replace(norm, w=norm.w / temperature)
    if isinstance(norm, Norm) and norm.b is not None:
        norm = replace(norm, b=norm.b / temperature)
    if head is not None and head.b is not None:
        head = replace(head, b=head.b / temperature)
    return replace(params, ln_f=norm, head=head)


def sample_groups(
    params: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    rng: torch.Generator,
    num_generations: int,
    eos_token_id: int,
    max_new_tokens: int,
    sampling: SamplingParams = SAMPLING,
    world: World = ALONE,
) -> Groups:
    """A group of answers to each prompt, all decoded as one batch. A prompt is prefilled once for its group.

    Every draw is a function of the key, the prompt's position and the answer's: equal keys give equal answers, bit for
    bit, and other prompts in the batch change an answer by the rounding of its logits alone.

    Args:
        params: The policy. Adapters that are merged into the weights decode faster, and equal to rounding.
        prompts: Token ids of each prompt.
        rng: A key.
        num_generations: Answers in a group, 2 or more.
        eos_token_id: The token that ends an answer.
        max_new_tokens: Most tokens of an answer.
        sampling: How the next token is chosen.
        world: The processes that share the answers, `fgpt.world()`: all of them call it with equal arguments, each
            samples one part, and all get all answers.

    Raises:
        InputError: for a group of one answer, and as `fgpt.generate` does.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params = fgpt.init(config, fgpt.key(0))
    >>> groups = sample_groups(
    ...     params, [[1, 2], [3]], rng=fgpt.key(1), num_generations=4, eos_token_id=0, max_new_tokens=3
    ... )
    >>> [len(group) for group in groups]
    [4, 4]
    """
    if num_generations < 2:
        raise InputError(f"num_generations is {num_generations}: expected 2 or more answers to compare in each group")
    count = len(prompts) * num_generations
    rows = range(count * world.rank // world.size, count * (world.rank + 1) // world.size)  # groups stay together
    sampled = generate(
        params,
        [prompts[row // num_generations] for row in rows],
        eos_token_id=eos_token_id,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        rng=[fold_in(rng, row) for row in rows],
    )
    outputs = sampled if world.size == 1 else [output for part in gather_objects(sampled) for output in part]
    return [outputs[i : i + num_generations] for i in range(0, len(outputs), num_generations)]


def group_rewards(
    reward: RewardFunction, rows: Sequence[Any], groups: Groups, decode: Callable[[list[int]], str]
) -> Float[Tensor, "groups answers"]:
    """The reward of each answer, on the CPU.

    Args:
        reward: From a row, an answer and whether it is finished to a number.
        rows: What each prompt was made from.
        groups: The answers to each prompt.
        decode: From token ids to text, such as a tokenizer's.

    Raises:
        InputError: for a reward that is not a finite number.
    """
    return torch.tensor(
        [
            [check_reward(reward(row, decode(answer.tokens), answer.finished)) for answer in group]
            for row, group in zip(rows, groups, strict=True)
        ]
    )


def check_reward(value: Any) -> float:
    """A reward as a float.

    Raises:
        InputError: for what is not a finite number, or is larger than `LARGEST_REWARD`.

    >>> check_reward(torch.tensor([0.5])), check_reward(True)
    (0.5, 1.0)
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    try:
        number = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not abs(number) <= LARGEST_REWARD:
        raise InputError(f"a reward is {short_repr(value)}: expected a finite number; fix the reward function")
    return number


def rollout_batches(
    prompts: Sequence[Sequence[int]],
    groups: Groups,
    advantages: Float[Tensor, "groups answers"] | Sequence[Sequence[float]],
    *,
    eos_token_id: int,
    micro_batch_size: int,
) -> list[RolloutBatch]:
    """Micro-batches of prompts with their answers, of similar lengths, whose union is all of them.

    Args:
        prompts: Token ids of each prompt.
        groups: The answers to each prompt, of which some may have more than others.
        advantages: Of each answer.
        eos_token_id: What follows a finished answer, and is learned with it.
        micro_batch_size: Most rows in a micro-batch.
    """
    rows: list[tuple[list[int], int, float]] = []
    of_groups = advantages.tolist() if isinstance(advantages, Tensor) else advantages
    for prompt, group, group_advantages in zip(prompts, groups, of_groups, strict=True):
        for answer, advantage in zip(group, group_advantages, strict=True):
            end = [eos_token_id] if answer.finished else []
            rows.append(([*prompt, *answer.tokens, *end], len(prompt), advantage))
    rows.sort(key=lambda row: len(row[0]))
    parts = [rows[i : i + micro_batch_size] for i in range(0, len(rows), micro_batch_size)]
    return [
        RolloutBatch(
            _collate([(text, start) for text, start, _ in part]), torch.tensor([advantage for _, _, advantage in part])
        )
        for part in parts
    ]


def _collate(rows: Sequence[tuple[list[int], int]]) -> Batch:
    """Texts padded on the right; those of their tokens are weighted that follow the prompt, whose length is given."""
    width = max(len(text) for text, _ in rows) - 1
    tokens, weights = torch.zeros(2, len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width)
    for i, (text, start) in enumerate(rows):
        tokens[:, i, : len(text) - 1] = torch.tensor([text[:-1], text[1:]])
        weights[i, start - 1 : len(text) - 1] = 1.0
    return Batch(tokens[0], tokens[1], weights, loss_positions=weights.flatten().nonzero().flatten())
