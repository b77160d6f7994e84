"""The training of a policy on rewards: each step samples answers from the state before it, and learns from them.

A step reads its prompts, the state and its key, and nothing else: a resumed training samples the same answers.

Several processes share the answers that are sampled and the micro-batches of the update. Each computes all rewards.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from fgpt.adapter_types import Adapters
from fgpt.adapters import adapt, merge
from fgpt.cli.metrics_log import HELDOUT_LOSS
from fgpt.cli.training.build import make_tuning_step
from fgpt.cli.training.job import InitialState, TrainingJob, fingerprint, place
from fgpt.cli.training.optimizers import make_optimizer, make_schedule
from fgpt.cli.training.pending import SAMPLED_TOKENS
from fgpt.data import packing
from fgpt.data.prompt_templates import InstructionRow
from fgpt.distributed import ALONE, World, sum_over_ranks, world
from fgpt.errors import InputError
from fgpt.generation.loop import GenerationOutput
from fgpt.losses import Batch, token_nll
from fgpt.model import GPT
from fgpt.objectives.grpo import RolloutBatch, grpo
from fgpt.objectives.rollouts import (
    Groups,
    RewardFunction,
    group_rewards,
    rollout_batches,
    sample_groups,
    with_temperature,
)
from fgpt.objectives.span_answers import SpanAnswer, advantages_with_spans, better_spans
from fgpt.recipes import GRPORecipe
from fgpt.rng import fold_in, key
from fgpt.tokenizers.tokenizer_files import Tokenizer
from fgpt.train_step import Key, Metrics, State, Step, Tree, init_state
from fgpt.tree import device, node, tree_map


@node
class PromptBatch(Batch):
    """Prompts, padded on the right, and the rows that they were made from; `segments` are 0 on padding."""

    rows: Int[Tensor, " prompts"] | None = None


def prompt_batches(prompts: Sequence[Sequence[int]], recipe: GRPORecipe, begin: int = 0) -> Iterator[list[Batch]]:
    """The prompts of one update after the other, from update `begin` on, without end: epoch after epoch in a fresh
    order. The last update of an epoch has the prompts that are left.
    """
    size = recipe.prompts_per_update
    per_epoch = math.ceil(len(prompts) / size)
    for epoch in itertools.count(begin // per_epoch):
        order = packing.permutation(len(prompts), fold_in(key(recipe.seed), f"prompts of epoch {epoch}"))
        first = begin % per_epoch if epoch == begin // per_epoch else 0
        for update in range(first, per_epoch):
            yield [collate_prompts(prompts, order[update * size : (update + 1) * size])]


def collate_prompts(prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> PromptBatch:
    """The prompts of these rows."""
    width = max(len(prompts[row]) for row in rows)
    tokens, segments = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width).long()
    for i, row in enumerate(rows):
        tokens[i, : len(prompts[row])] = torch.tensor(prompts[row])
        segments[i, : len(prompts[row])] = 1
    targets = tokens.roll(-1, 1)
    weights = (segments.roll(-1, 1) * segments).float()
    weights[:, -1] = 0.0
    return PromptBatch(tokens, targets, weights, segments, rows=torch.tensor(rows))


def assemble_rollout_job(
    recipe: GRPORecipe,
    base: GPT,
    *,
    adapters: Adapters,
    rows: Sequence[InstructionRow],
    prompts: Sequence[Sequence[int]],
    reward: RewardFunction,
    tokenizer: Tokenizer,
    heldout_loss: Callable[[GPT], float] | None = None,
    **others: Any,
) -> TrainingJob:
    """The training of `adapters` over `base` on answers to `prompts`, which were made from `rows`.

    Args:
        heldout_loss: what the policy lacks on held-out rows.
        others: what the training reads besides, for its fingerprint.

    Raises InputError if groups do not divide the rows of an update, or if a held-out loss is requested and there are no
    held-out rows.
    """
    if recipe.rows_per_update % recipe.num_generations:
        raise InputError(
            f"--micro-batch-size {recipe.micro_batch_size} times --grad-accumulation-steps "
            f"{recipe.grad_accumulation_steps} are {recipe.rows_per_update} answers in a step: expected a multiple of "
            f"--num-generations {recipe.num_generations}"
        )
    if recipe.keep_best and not recipe.eval_every:
        raise InputError("--keep-best keeps the state of least held-out loss: give --eval-every N as well")
    if isinstance(recipe.eval_every, int) and heldout_loss is None:
        raise InputError(f"--eval-every {recipe.eval_every} needs held-out examples, and there are none")
    steps = recipe.steps or max(1, round(recipe.epochs * math.ceil(len(prompts) / recipe.prompts_per_update)))
    schedule = make_schedule(recipe, steps)
    optimizer = make_optimizer(recipe, schedule)

    def objective(params: GPT, rollouts: RolloutBatch) -> tuple[Tensor, Tensor]:
        policy = with_temperature(params, recipe.temperature)
        return grpo(policy, rollouts, beta=recipe.beta, remat=recipe.remat, compile=recipe.compile)

    update = make_tuning_step(optimizer, objective)
    return TrainingJob(
        recipe=recipe,
        step=rollout_step(recipe, update, rows, reward, tokenizer, world()),
        frozen=base,  # whole: it is the reference, too
        batches=lambda begin: prompt_batches(prompts, recipe, begin),
        steps=steps,
        schedule=schedule,
        rng=fold_in(key(recipe.seed), "steps"),
        fingerprint=fingerprint(recipe, base, tokenizer, recipe.base, training_rows=rows, **others),
        initial_state=InitialState(init_state(adapters, optimizer)),
        tokenizer=tokenizer,
        eval_losses={} if heldout_loss is None else {HELDOUT_LOSS: lambda tuned: heldout_loss(adapt(base, tuned))},
        evaluation_params=lambda state: optimizer.evaluation_params(state.opt_state, state.trainable),
    )


def rollout_step(
    recipe: GRPORecipe,
    update: Step,
    rows: Sequence[InstructionRow],
    reward: RewardFunction,
    tokenizer: Tokenizer,
    here: World = ALONE,
) -> Step:
    """A step of a training: answers to its prompts, their rewards, and one update from them.

    The answers are the policy's own, with its adapters merged into the weights (equal to rounding), so that every ratio
    of the update is 1; a span counts as one of them. Without a penalty on the divergence, groups of equal rewards and
    no span give no gradient, and are left out.
    """
    eos = tokenizer.eos_token_id

    def fits(span: str) -> bool:
        return len(tokenizer.encode(span)) < recipe.max_completion_length  # EOS follows

    def step(state: State, frozen: Tree, batches: Sequence[Batch], rng: Key | None = None) -> tuple[State, Metrics]:
        (batch,) = batches
        assert isinstance(batch, PromptBatch)
        assert batch.rows is not None
        assert isinstance(rng, torch.Generator)
        prompts = prompts_of(batch)
        batch_rows = [rows[i] for i in batch.rows.tolist()]
        with torch.no_grad():
            policy = with_temperature(merge(adapt(frozen, state.trainable), "dequantized"), recipe.temperature)
            reference = with_temperature(frozen, recipe.temperature)
            groups = sample_groups(
                policy,
                prompts,
                rng=fold_in(rng, "rollouts"),
                num_generations=recipe.num_generations,
                eos_token_id=eos,
                max_new_tokens=recipe.max_completion_length,
                world=here,
            )
            rewards = group_rewards(reward, batch_rows, groups, tokenizer.decode)
            kl = reference_kl(policy, reference, prompts, groups, eos, here)
        spans: list[SpanAnswer | None] = [None for _ in groups]
        if recipe.span_words:
            longest = min(recipe.span_words, recipe.max_completion_length - 1)  # a word has a token, and EOS is one
            texts = [row.input for row in batch_rows]
            spans = better_spans(reward, batch_rows, texts, longest, rewards, fits=fits)
        advantages = advantages_with_spans(rewards, spans, scale=recipe.scale_rewards)
        used = range(len(groups)) if recipe.beta else informative(advantages)
        rollouts = rollout_batches(
            [prompts[i] for i in used],
            [[*groups[i], *span_outputs(spans[i], tokenizer)] for i in used],
            [advantages[i] for i in used],
            eos_token_id=eos,
            micro_batch_size=int(recipe.micro_batch_size),
            share_prompts=not recipe.compile,
        )
        target = device(state.trainable)
        placed: list[Any] = list(rollouts)
        for i in here.share(range(len(rollouts))):  # those that this process computes the gradients of
            placed[i] = with_reference(reference, tree_map(lambda x: x.to(target), rollouts[i]), recipe.beta)
        state, metrics = update(state, frozen, placed, fold_in(rng, "update"))
        answers = [answer for group in groups for answer in group]
        lengths = torch.tensor([len(answer.tokens) + answer.finished for answer in answers], dtype=torch.float32)
        finished = torch.tensor([float(answer.finished) for answer in answers])
        figures = {
            "reward": rewards.mean(),
            "reward_std": rewards.std(-1).mean(),
            "frac_reward_zero_std": (rewards.amax(-1) == rewards.amin(-1)).float().mean(),
            "kl": kl,
            "mean_completion_length": lengths.mean(),
            "finished_ratio": finished.mean(),
            SAMPLED_TOKENS: lengths.sum(),
        }
        if recipe.span_words:
            figures["span_ratio"] = torch.tensor(sum(span is not None for span in spans) / len(spans))
        others = {name: x.to(metrics.loss.device) for name, x in figures.items()}
        return state, Metrics(metrics.loss, metrics.grad_norm, metrics.weight, others)

    return step


def prompts_of(batch: PromptBatch) -> list[list[int]]:
    """The prompts without their padding."""
    assert batch.segments is not None
    return [row[:length] for row, length in zip(batch.tokens.tolist(), batch.segments.sum(-1).tolist(), strict=True)]


def informative(advantages: Sequence[Sequence[float]]) -> list[int]:
    """The groups with an advantage; the first one if none has any, so that a step has a batch."""
    return [i for i, of_group in enumerate(advantages) if any(of_group)] or [0]


def span_outputs(span: SpanAnswer | None, tokenizer: Tokenizer) -> list[GenerationOutput]:
    """A span as what could have been sampled; none for None."""
    return [] if span is None else [GenerationOutput(tokenizer.encode(span.text), True, [])]


def with_reference(reference: GPT, rollouts: RolloutBatch, beta: float) -> RolloutBatch:
    """The batch with the log-probabilities of the reference, if the loss needs them."""
    if not beta:
        return rollouts
    with torch.no_grad():
        nll, _ = token_nll(reference, rollouts.batch, prompts=rollouts.prompts)
        return replace(rollouts, reference=-nll)


def reference_kl(
    policy: GPT,
    reference: GPT,
    prompts: Sequence[Sequence[int]],
    groups: Groups,
    eos_token_id: int,
    here: World = ALONE,
) -> Tensor:
    """An estimate of KL(policy, reference) in nats per token, never negative, on the first answer to each prompt.

    Source: Schulman 2020, "Approximating KL Divergence", the estimator k3.
    """
    prompts, first = here.share(prompts), [group[:1] for group in here.share(groups)]
    target = device(policy)
    total, count = torch.zeros((), device=target), torch.zeros((), device=target)
    for rollouts in rollout_batches(
        prompts,
        first,
        torch.zeros(len(first), 1),
        eos_token_id=eos_token_id,
        micro_batch_size=max(1, len(first)),
        share_prompts=False,  # each has one answer here
    ):  # one batch, or none
        batch = place(rollouts.batch, target)
        log_q = token_nll(policy, batch)[0] - token_nll(reference, batch)[0]  # log of reference / policy
        total, count = total + (torch.expm1(log_q) - log_q).sum(), count + log_q.numel()
    if here.size > 1:
        total, count = sum_over_ranks((total, count))
    return total / count
