"""Answers that were shuffled are found: the weight of a row is a function of what a tuned model makes of it, and this
function is learned by the derivative of clean rows' loss through a whole training.

    python -m experiments.research.shuffled_answers [--tune 300]

40 % of nano's answers are given to one another. In each round LoRAs are trained on all rows but a fold, times their
weights, and look at the fold: a row's features are how far the loss of its answer is above that of the same answer
after other prompts, in all and per token. (The loss alone is high of long and of rare answers.) From the second round
on features are means over the rounds: those of the first, whose LoRAs have read every answer as true, are left out. The
weight of a row is

    w = sigmoid(a · features + b)

a and b follow the derivative of the loss of clean rows, which no training reads, after a training on all rows times
their weights. Figures are AUCs of finding the shuffled rows, by each feature, by the weights, and by the derivative by
each row's own weight; and, with --tune, the points of a tuning on clean rows, on all, on weighted ones, and on those
whose weight is above the mean. (A batch's loss is a weighted mean: it sees weights up to a factor.)

Sources: Engstrom et al. 2025, "Optimizing ML Training with Metagradient Descent"; Shu et al. 2019, "Meta-Weight-Net:
Learning an Explicit Mapping For Sample Weighting", section 2; Northcutt et al. 2021, "Confident Learning", section 3
(a row is judged by a model that has not seen it).
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import grad

import fgpt
from experiments.research.attribution import tuning_loss
from fgpt.adapter_types import Adapters
from fgpt.cli.evaluation.metrics.nano import score
from fgpt.cli.training.examples import NANO_HELDOUT, NANO_TASKS
from fgpt.cli.training.nano_rows import Task, read_tasks
from fgpt.data.examples import Example
from fgpt.data.packing import collate, lay_out_rows, permutation
from fgpt.data.prompt_templates import PLAIN, encode, encode_prompt
from fgpt.optim import linear_schedule
from fgpt.train_step import State, Step
from fgpt.transforms.unroll import metagradient, unroll

FEATURES = ("loss above that after other prompts", "the same per token")
EPS_ROOT = 1e-6
"""Under AdamW's root where it is differentiated: it has no derivative where a moment is 0. It learns more slowly."""
LR = 5e-3
"""The peak learning rate of every training."""
META_LR = 0.5
"""Of Adam on a and b: features have a standard deviation of 1."""


def shuffle_answers(tasks: Sequence[Task], share: float, rng: torch.Generator) -> tuple[list[Task], Bool[Tensor, " n"]]:
    """The rows, of which a share has the answers of others among them, and which ones have."""
    chosen = permutation(len(tasks), rng)[: round(share * len(tasks))]
    rows = list(tasks)
    for i, j in zip(chosen, np.roll(chosen, 1), strict=True):
        rows[i] = replace(tasks[i], output=tasks[j].output)
    return rows, torch.tensor([row.output != task.output for row, task in zip(rows, tasks, strict=True)])


def batch_of(examples: Sequence[Example]) -> fgpt.Batch:
    """One example in each row, and logits only where there is a weight."""
    batch = collate([[example] for example in examples])
    return replace(batch, loss_positions=batch.weights.flatten().nonzero().flatten())


@dataclass(frozen=True)
class Training:
    """A LoRA on nano, trained on some of the rows times their weights."""

    base: fgpt.GPT
    examples: list[Example]
    subset: Sequence[int]
    steps: int
    batch_size: int
    rank: int
    seed: int
    eps_root: float = 0.0

    def optimizer(self) -> fgpt.Optimizer:
        schedule = linear_schedule(LR, self.steps, warmup_steps=max(1, self.steps // 20))
        return fgpt.adamw(schedule, eps_root=self.eps_root)

    def start(self) -> State:
        return fgpt.init_state(fgpt.lora(self.base, fgpt.key(self.seed), rank=self.rank), self.optimizer())

    @cached_property
    def step(self) -> Step:
        return fgpt.make_step(tuning_loss, self.optimizer())

    @cached_property
    def order(self) -> list[list[int]]:
        """The rows of each step, epoch after epoch, those of similar length together."""
        lengths, steps = np.array([len(x.tokens) for x in self.examples]), list[list[int]]()
        while len(steps) < self.steps:
            rng = fgpt.key(1000 * self.seed + len(steps))
            shuffled = [self.subset[i] for i in permutation(len(self.subset), rng)]
            epoch = lay_out_rows(shuffled, lengths, int(lengths.max()), self.batch_size, rng=rng, packed=False)
            steps += [[i for row in batch for i in row] for batch in epoch]
        return steps[: self.steps]

    def advance(self, state: State, t: int, row_weights: Float[Tensor, " rows"]) -> State:
        batch = batch_of([self.examples[i] for i in self.order[t]])
        weighted = replace(batch, weights=batch.weights * row_weights[self.order[t]][:, None])
        return self.step(state, self.base, [weighted], None)[0]

    def run(self, row_weights: Float[Tensor, " rows"]) -> Adapters:
        return unroll(self.advance, self.start(), row_weights, self.steps).final.trainable


@torch.no_grad()
def row_losses(params: fgpt.GPT, examples: Sequence[Example]) -> Float[Tensor, " rows"]:
    """The negative log-likelihood of each answer, summed over its tokens."""
    losses = torch.zeros(len(examples))
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
    for begin in range(0, len(examples), 32):
        indices = by_length[begin : begin + 32]
        losses[indices] = fgpt.nll(params, batch_of([examples[i] for i in indices]), per_example=True)[0]
    return losses


def random_prompts(num_rows: int, count: int, rng: torch.Generator) -> Int[Tensor, "rows count"]:
    """For each row some others."""
    shifts = 1 + torch.randperm(num_rows - 1, generator=rng)[:count]
    return (torch.arange(num_rows)[:, None] + shifts) % num_rows


class Features(NamedTuple):
    """What a tuned model makes of rows."""

    losses: Float[Tensor, " rows"]
    """Of each answer, per token."""
    above: Float[Tensor, "rows features"]
    """How far the loss of each answer is above that after other prompts."""


def features_of(
    params: fgpt.GPT, rows: Sequence[Task], which: Sequence[int], others: Int[Tensor, "rows _count"]
) -> Features:
    """The features of the rows in `which`, whose answers are compared with themselves after other prompts."""
    tokenizer = fgpt.tokenizer("nano")
    lengths = torch.tensor([len(tokenizer.encode(rows[i].output)) + 1 for i in which])

    def losses(prompts: Sequence[int]) -> Float[Tensor, " which"]:
        mixed = [replace(rows[j], output=rows[i].output) for i, j in zip(which, prompts, strict=True)]
        return row_losses(params, [encode(row, PLAIN, tokenizer) for row in mixed])

    own_losses = losses(which)
    after = torch.stack([losses(column) for column in others[list(which)].T.tolist()])
    above = own_losses + torch.logsumexp(-after, 0) - math.log(len(after))
    return Features(own_losses / lengths, torch.stack([above, above / lengths], 1))


def auc(scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"]) -> float:
    """How often a positive row has a higher score than another one, ties counted half."""
    differences = scores[positive][:, None] - scores[~positive]
    return float((differences.sign() + 1).mean() / 2)


def weights_of(z: Float[Tensor, "rows features"], coefficients: Float[Tensor, " features+1"]) -> Float[Tensor, " rows"]:
    return (z @ coefficients[:-1] + coefficients[-1]).sigmoid()


def points(params: fgpt.GPT, tasks: Sequence[Task]) -> tuple[float, float]:
    """The mean points of greedy answers, and their standard error."""
    tokenizer = fgpt.tokenizer("nano")
    prompts = [encode_prompt(task, PLAIN, tokenizer) for task in tasks]
    answers = fgpt.generate(params, prompts, eos_token_id=tokenizer.eos_token_id, max_new_tokens=160)
    each = torch.tensor(
        [score([t], [tokenizer.decode(x.tokens)], [x.finished]).points for t, x in zip(tasks, answers, strict=True)]
    )
    return float(each.mean()), float(each.std() / math.sqrt(len(tasks)))


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """The AUC of the weights and of the derivative by each row's own weight; with --tune, the points."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="rows to train on; all by default")
    parser.add_argument("--share", type=float, default=0.4, help="of the rows whose answers are shuffled")
    parser.add_argument("--clean", type=int, default=80, help="rows that only the derivative sees")
    parser.add_argument("--rounds", type=int, default=5, help="times that features are computed")
    parser.add_argument("--steps", type=int, default=200, help="updates of the trainings that features come from")
    parser.add_argument("--meta-rounds", type=int, default=4, help="updates of a and b in a round")
    parser.add_argument("--meta-steps", type=int, default=40, help="updates of the trainings that they go through")
    parser.add_argument("--batch-size", type=int, default=16, help="rows of an update")
    parser.add_argument("--folds", type=int, default=4, help="trainings of a round; each row is judged by one of them")
    parser.add_argument(
        "--prompts", type=int, default=24, help="other prompts, after which an answer is compared with itself"
    )
    parser.add_argument("--tune", type=int, default=0, metavar="STEPS", help="updates of the trainings with points")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    base, tokenizer, rng = fgpt.load("nano"), fgpt.tokenizer("nano"), fgpt.key(options.seed)
    tasks = read_tasks(NANO_TASKS)
    tasks, clean = tasks[options.clean :][: options.rows], tasks[: options.clean]
    rows, shuffled = shuffle_answers(tasks, options.share, rng)
    examples = [encode(row, PLAIN, tokenizer) for row in rows]
    validation = batch_of([encode(row, PLAIN, tokenizer) for row in clean])
    print(f"{len(rows)} rows, of which {int(shuffled.sum())} have the answer of another", flush=True)

    def training(subset: Sequence[int], steps: int, seed: int, rank: int = 8, of: Sequence[Example] = examples):
        return Training(base, list(of), subset, steps, options.batch_size, rank, 100 * options.seed + seed)

    def validation_loss(adapters: Adapters) -> Float[Tensor, ""]:
        return fgpt.loss(fgpt.adapt(base, adapters), validation)

    everything, order = range(len(rows)), np.array(permutation(len(rows), rng))
    through = replace(training(everything, options.meta_steps, 0, rank=4), eps_root=EPS_ROOT)
    results: dict[str, float] = {}

    def by_row_weight(row_weights: Float[Tensor, " rows"]) -> tuple[Float[Tensor, " rows"], float]:
        """The derivative of the clean rows' loss by each row's weight, and this loss."""
        result = unroll(through.advance, through.start(), row_weights, options.meta_steps)
        loss = float(validation_loss(result.final.trainable))
        cotangent = grad(validation_loss)(result.final.trainable)
        return metagradient(through.advance, result, row_weights, cotangent).meta, loss

    row_weights = torch.ones(len(rows))
    derivative, _ = by_row_weight(row_weights)
    read = torch.tensor(sorted({i for step in through.order for i in step}))
    results["row by row"] = auc(derivative[read], shuffled[read])
    print(f"by each row's own derivative: AUC {results['row by row']:.3f} of {len(read)} rows read", flush=True)
    coefficients = torch.zeros(len(FEATURES) + 1, requires_grad=True)
    by_round: list[Float[Tensor, "rows features"]] = []
    for i in range(options.rounds):
        losses, above = torch.zeros(len(rows)), torch.zeros(len(rows), len(FEATURES))
        others = random_prompts(len(rows), options.prompts, rng)
        for k, fold in enumerate(np.array_split(order, options.folds)):
            to_train = order[~np.isin(order, fold)].tolist()
            adapters = training(to_train, options.steps, options.folds * i + k + 1).run(row_weights)
            params = fgpt.merge(fgpt.adapt(base, adapters))
            losses[fold], above[fold] = features_of(params, rows, fold.tolist(), others)
        by_round.append(above)
        above = torch.stack(by_round[1:] or by_round).mean(0)
        z = (above - above.mean(0)) / above.std(0)
        alone = ", ".join(f"{name} {auc(z[:, k], shuffled):.3f}" for k, name in enumerate(FEATURES))
        print(f"round {i}: AUC by {alone}, loss per token {auc(losses, shuffled):.3f}", flush=True)
        optimizer = torch.optim.Adam([coefficients], lr=META_LR)
        for _ in range(options.meta_rounds):
            weights = weights_of(z, coefficients)
            derivative, loss = by_row_weight(weights.detach())
            (coefficients.grad,) = torch.autograd.grad(weights, coefficients, derivative)
            optimizer.step()
            print(f"round {i}: loss of clean rows {loss:.4f}", flush=True)
        row_weights = weights_of(z, coefficients).detach()
        results["weights"] = auc(-row_weights, shuffled)
        print(f"round {i}: AUC by the weights {results['weights']:.3f}", flush=True)
        means = ", ".join(f"{float(row_weights[of].mean()):.2f}" for of in (~shuffled, shuffled))
        print(f"round {i}: mean weight of clean and shuffled rows {means}; a, b {coefficients.tolist()}", flush=True)
    if options.tune:
        heldout, unshuffled = read_tasks(NANO_HELDOUT), [encode(task, PLAIN, tokenizer) for task in tasks]
        trusted_rows = (row_weights > row_weights.mean()).nonzero().flatten().tolist()
        print(f"kept rows: {len(trusted_rows)}, of which {int(shuffled[trusted_rows].sum())} are shuffled", flush=True)
        ones = torch.ones(len(rows))
        for name, of, subset, weights in (
            ("clean", unshuffled, everything, ones),
            ("shuffled", examples, everything, ones),
            ("weighted", examples, everything, row_weights),
            ("kept", examples, trusted_rows or everything, ones),
        ):
            adapters = training(subset, options.tune, 50, rank=16, of=of).run(weights)
            results[f"{name} points"], error = points(fgpt.merge(fgpt.adapt(base, adapters)), heldout)
            print(f"tuned on {name} rows: {results[f'{name} points']:.1f} ± {error:.1f} points", flush=True)
    return results


if __name__ == "__main__":
    main()
