"""Which training rows made a tuned model answer as it does, by metagradients, against trainings without some rows.

    python -m experiments.research.attribution [--queries 50 --subsets 100 --drop 0.01 --quantize nf4]

A LoRA on nano is trained on rows of its instructions. Each method predicts how the losses of held-out rows change if
some rows are left out; the truth is a training without them, all of them vmapped over the weights of the rows. The
figure is the linear datamodeling score, the rank correlation of the two over the subsets (Park et al. 2023, section
2.3): of each query, and of the mean loss of all queries.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

import fgpt
from fgpt.adapter_types import Adapters
from fgpt.cli.training.examples import NANO_HELDOUT, NANO_TASKS
from fgpt.cli.training.nano_rows import read_tasks
from fgpt.data.packing import collate
from fgpt.data.prompt_templates import PLAIN, encode
from fgpt.optim import linear_schedule
from fgpt.train_step import State, Step
from fgpt.transforms.attribution import influence, lds, tracin
from fgpt.transforms.laplace import kronecker_curvature
from fgpt.transforms.per_example import gradient_similarity, per_example_grads
from fgpt.transforms.unroll import Unrolled, metagradient, unroll
from fgpt.tree import ravel, tree_map

WIDTH, QUERY_WIDTH = 64, 192
"""Positions of training rows and of queries: longer ones are left out."""
MEMBERS = 10
"""Trainings that are mapped over at once."""


@dataclass(frozen=True)
class Training:
    """A LoRA on nano that reads each row in a fixed order, times its weight."""

    base: fgpt.GPT
    rows: list[fgpt.Batch]
    queries: list[fgpt.Batch]
    steps: int
    micro_batch_size: int
    lr: float
    eps_root: float
    seed: int

    def optimizer(self) -> fgpt.Optimizer:
        return fgpt.adamw(linear_schedule(self.lr, self.steps, warmup_steps=self.steps // 10), eps_root=self.eps_root)

    def start(self) -> State:
        return fgpt.init_state(fgpt.lora(self.base, fgpt.key(self.seed), rank=4), self.optimizer())

    @cached_property
    def batches(self) -> list[tuple[list[int], fgpt.Batch]]:
        """The rows of each step, by index and read: epoch after epoch in another order."""
        count = self.steps * self.micro_batch_size
        epochs = range(-(-count // len(self.rows)))
        orders = [torch.randperm(len(self.rows), generator=fgpt.key(1000 * self.seed + epoch)) for epoch in epochs]
        steps = [indices.tolist() for indices in torch.cat(orders)[:count].split(self.micro_batch_size)]
        return [(indices, join([self.rows[i] for i in indices])) for indices in steps]

    def advance(self, state: State, t: int, row_weights: Float[Tensor, " rows"]) -> State:
        indices, batch = self.batches[t]
        weighted = fgpt.Batch(batch.tokens, batch.targets, batch.weights * row_weights[indices][:, None])
        return self.step(state, self.base, [weighted], None)[0]

    @cached_property
    def step(self) -> Step:
        return fgpt.make_step(tuning_loss, self.optimizer())

    def row_loss(self, adapters: Adapters, row: fgpt.Batch) -> Float[Tensor, ""]:
        """The sum over the tokens of a row, as a step adds it up."""
        return fgpt.nll(fgpt.adapt(self.base, adapters), row)[0]

    def query_loss(self, adapters: Adapters, row: fgpt.Batch) -> Float[Tensor, ""]:
        return fgpt.loss(fgpt.adapt(self.base, adapters), row)


def tuning_loss(adapters: Adapters, base: fgpt.GPT, batch: fgpt.Batch, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    return fgpt.nll(fgpt.adapt(base, adapters), batch)


def join(rows: Sequence[fgpt.Batch]) -> fgpt.Batch:
    return fgpt.Batch(*(torch.cat([getattr(row, name) for row in rows]) for name in ("tokens", "targets", "weights")))


def read_rows(path: Any, width: int) -> list[fgpt.Batch]:
    tokenizer = fgpt.tokenizer("nano")
    examples = [encode(row, PLAIN, tokenizer) for row in read_tasks(path)]
    batches = [collate([[example]], width) for example in examples if len(example.tokens) <= width]
    return [fgpt.Batch(x.tokens, x.targets, x.weights) for x in batches]


def retrain_without(training: Training, row_weights: Float[Tensor, "subsets rows"]) -> Float[Tensor, "subsets queries"]:
    """The losses of the queries after each training, all of one group in one vmapped run."""
    losses: list[Tensor] = []
    for weights in row_weights.split(MEMBERS):
        copies = [training.start()] * len(weights)
        states = tree_map(lambda *xs: torch.stack(xs), *copies)
        for t in range(training.steps):
            states = vmap(training.advance, in_dims=(0, None, 0))(states, t, weights)
        losses.append(vmap(lambda adapters: query_losses(training, adapters))(states.trainable).detach())
    return torch.cat(losses)


def query_losses(training: Training, adapters: Adapters) -> Float[Tensor, " queries"]:
    queries = join(training.queries)
    stacked = fgpt.Batch(queries.tokens[:, None], queries.targets[:, None], queries.weights[:, None])
    return vmap(lambda row: training.query_loss(adapters, row))(stacked)


def by_metagradient(training: Training, result: Unrolled) -> Float[Tensor, "queries rows"]:
    cotangents = per_example_grads(training.query_loss, result.final.trainable, training.queries).grads
    row_weights = torch.ones(len(training.rows))
    return metagradient(training.advance, result, row_weights, cotangents, chunk_size=10).meta


def by_tracin(training: Training, result: Unrolled) -> Float[Tensor, "queries rows"]:
    points = [state.trainable for state in result.checkpoints.values()]
    return -tracin(training.row_loss, points, training.rows, training.queries, query_loss=training.query_loss).T


def by_influence(training: Training, result: Unrolled) -> Float[Tensor, "queries rows"]:
    """With Kronecker factors, damped by a tenth of the mean eigenvalue (Grosse et al. 2023)."""
    adapters = result.final.trainable

    def logits(adapters: Adapters, batch: fgpt.Batch) -> Float[Tensor, "n vocab"]:
        return fgpt.apply(fgpt.adapt(training.base, adapters), batch.tokens)[batch.weights > 0]

    curvature = kronecker_curvature(logits, adapters, training.rows, fgpt.key(training.seed), num_samples=4)
    damping = 0.1 * float(ravel(curvature.eigenvalues)[0].mean())
    effects = influence(
        training.row_loss,
        adapters,
        training.rows,
        training.queries,
        curvature,
        damping=damping,
        query_loss=training.query_loss,
    )
    return -effects.T


def by_cosine(training: Training, result: Unrolled) -> Float[Tensor, "queries rows"]:
    return -gradient_similarity(training.row_loss, result.final.trainable, training.rows, training.queries).T


METHODS: dict[str, Callable[[Training, Unrolled], Float[Tensor, "queries rows"]]] = {
    "metagradient": by_metagradient,
    "TracIn": by_tracin,
    "K-FAC influence": by_influence,
    "gradient cosine": by_cosine,
}


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300, help="training rows")
    parser.add_argument("--steps", type=int, default=100, help="updates")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="rows of an update")
    parser.add_argument("--queries", type=int, default=50, help="held-out rows whose losses are explained")
    parser.add_argument("--subsets", type=int, default=100, help="trainings without some rows")
    parser.add_argument("--drop", type=float, default=0.01, help="share of the rows that each of them leaves out")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--eps-root", type=float, default=1e-6, help="epsilon under AdamW's root: 0 is plain AdamW")
    parser.add_argument("--quantize", choices=["nf4", "int8"], help="format of the base")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    base = fgpt.load("nano")
    training = Training(
        base if options.quantize is None else fgpt.quantize(base, options.quantize),
        read_rows(NANO_TASKS, WIDTH)[: options.rows],
        read_rows(NANO_HELDOUT, QUERY_WIDTH)[: options.queries],
        steps=options.steps,
        micro_batch_size=options.micro_batch_size,
        lr=options.lr,
        eps_root=options.eps_root,
        seed=options.seed,
    )
    num_rows, num_dropped = len(training.rows), max(1, round(options.drop * len(training.rows)))
    print(f"{num_rows} rows, {len(training.queries)} queries, {training.steps} steps", flush=True)
    ones = torch.ones(num_rows)
    result, seconds = measure_time(lambda: unroll(training.advance, training.start(), ones, training.steps))
    before = query_losses(training, training.start().trainable).mean()
    after = query_losses(training, result.final.trainable).detach()
    print(f"one training: {seconds:.1f} s, mean loss of the queries {before:.3f} -> {after.mean():.3f}", flush=True)
    row_weights = torch.ones(options.subsets, num_rows)
    for i in range(options.subsets):
        row_weights[i, torch.randperm(num_rows, generator=fgpt.key(10_000 + i))[:num_dropped]] = 0
    truth, truth_seconds = measure_time(lambda: retrain_without(training, row_weights))
    ratio = truth_seconds / seconds / options.subsets
    print(
        f"{options.subsets} trainings without {num_dropped} rows: {truth_seconds:.0f} s, {ratio:.2f} of a loop",
        flush=True,
    )
    print(f"spread of a query's loss over them: {truth.std(0).mean():.2g} nats", flush=True)
    scores: dict[str, float] = {}
    for name in options.methods:
        effects, method_seconds = measure_time(lambda name=name: METHODS[name](training, result))
        score = lds(effects, row_weights, truth)
        scores[name] = float(score.per_query.mean())
        worst, best = score.per_query.min(), score.per_query.max()
        print(
            f"{name}: LDS {scores[name]:.3f} mean per query ({worst:.2f} to {best:.2f}), {score.aggregate:.3f} of the "
            f"mean loss; {method_seconds:.0f} s, {method_seconds / seconds:.1f} trainings",
            flush=True,
        )
    return scores


def measure_time(fn: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.monotonic()
    result = fn()
    return result, time.monotonic() - begin


if __name__ == "__main__":
    main()
