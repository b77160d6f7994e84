"""Rollouts: a group of sampled answers to each prompt, their rewards, and the batches that `grpo` learns from.

groups  = sample_groups(params, prompts, rng=key, num_generations=8, ..)       a function of params and key
rewards = group_rewards(reward, rows, groups, decode)                          a number for each text
batches = rollout_batches(prompts, groups, group_advantages(rewards), ..)      answers, and their prompts once
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
from fgpt.model import GPT, Norm, SharedPrompts, pad_prompts
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
    share_prompts: bool = True,
) -> list[RolloutBatch]:
    """Micro-batches of answers, whose union is all of them.

    Args:
        prompts: Token ids of each prompt.
        groups: The answers to each prompt, of which some may have more than others.
        advantages: Of each answer.
        eos_token_id: What follows a finished answer, and is learned with it.
        micro_batch_size: Most answers in a micro-batch.
        share_prompts: In a micro-batch each prompt is read once for all its answers; so the answers to a prompt follow
            one another, beside groups whose longest answers are of similar lengths. False: a row is a prompt with its
            answer, as `compile` and a vmap over rows need them, beside rows of similar lengths.
    """
    of_groups = advantages.tolist() if isinstance(advantages, Tensor) else advantages
    rows: list[tuple[int, list[int], float]] = []
    for i in sorted(range(len(groups)), key=lambda i: max((len(answer.tokens) for answer in groups[i]), default=0)):
        for answer, advantage in zip(groups[i], of_groups[i], strict=True):
            rows.append((i, [*answer.tokens, *([eos_token_id] if answer.finished else [])], advantage))
    if not share_prompts:
        rows.sort(key=lambda row: len(prompts[row[0]]) + len(row[1]))
    parts = [rows[begin : begin + micro_batch_size] for begin in range(0, len(rows), micro_batch_size)]
    batches: list[RolloutBatch] = []
    for part in parts:
        # The last token of a prompt predicts the first one of the answer: it is in the row.
        texts = [(prompts[prompt][-1:] if share_prompts else prompts[prompt], answer) for prompt, answer, _ in part]
        shared = _shared_prompts(prompts, [prompt for prompt, _, _ in part]) if share_prompts else None
        batches.append(RolloutBatch(_collate(texts), torch.tensor([row[2] for row in part]), prompts=shared))
    return batches


def _collate(texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Batch:
    """Rows of a beginning and an answer, padded on the right; the answer's tokens are weighted."""
    width = max(len(beginning) + len(answer) for beginning, answer in texts) - 1
    tokens, weights = torch.zeros(2, len(texts), width, dtype=torch.int64), torch.zeros(len(texts), width)
    for i, (beginning, answer) in enumerate(texts):
        row = [*beginning, *answer]
        tokens[:, i, : len(row) - 1] = torch.tensor([row[:-1], row[1:]])
        weights[i, len(beginning) - 1 : len(row) - 1] = 1.0
    return Batch(tokens[0], tokens[1], weights, loss_positions=weights.flatten().nonzero().flatten())


def _shared_prompts(prompts: Sequence[Sequence[int]], prompt_of_row: Sequence[int]) -> SharedPrompts | None:
    """The prompts of these rows without their last tokens; None if nothing is left."""
    distinct = list(dict.fromkeys(prompt_of_row))
    beginnings = [prompts[prompt][:-1] for prompt in distinct]
    if not any(beginnings):
        return None
    return pad_prompts(beginnings, [distinct.index(prompt) for prompt in prompt_of_row])
