"""Task arithmetic in the tangent space: adapters of several kinds of questions, each trained by itself, are added. Once
they are trained as usual, once as the model's first-order expansion, in which changes of outputs add up.

    python -m experiments.research.tangent_space            # --tiny: a few steps of small batches

What is trained is B of a LoRA, with one A for all kinds: a sum of Bs is the sum of the changes of weights. Printed are
losses on rows that no training reads, in nats per token: of each adapter on its own kind, and of the sum of all on all
kinds, at the best factor of the sum. Then the empirical neural tangent kernel of rows of all kinds.

Source: Ortiz-Jimenez et al. 2023, "Task Arithmetic in the Tangent Space", sections 4 and 5.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

import fgpt
from experiments.research.nano_kinds import rows_by_kind, take
from fgpt.losses import at_loss, loss_hidden
from fgpt.transforms.linearize import empirical_ntk, tangent_model
from fgpt.tree import tree_map

Tree = Any
Model = Callable[[Tree, fgpt.Batch], Float[Tensor, "n vocab"]]
"""(Bs, batch) -> logits where the batch has a loss."""

KINDS = ("where", "like", "title", "who")
FACTORS = (0.25, 0.5, 0.75, 1.0)


class Size(NamedTuple):
    """How much is trained and evaluated.

    Args:
        rank: Of the LoRAs.
        steps: Of AdamW.
        batch: Rows of a step.
        held_out: Rows of each kind that no training reads.
        ntk_rows: Rows of each kind in the kernel.
    """

    rank: int
    steps: int
    batch: int
    held_out: int
    ntk_rows: int


FULL = Size(rank=8, steps=60, batch=8, held_out=20, ntk_rows=20)
TINY = Size(rank=2, steps=2, batch=2, held_out=2, ntk_rows=2)


class Problem(NamedTuple):
    """A base, a fresh LoRA, and its rows by kind.

    Args:
        base: The model.
        fresh: The LoRA: each A is used as it is.
        train: Rows for training.
        test: Others.
    """

    base: fgpt.GPT
    fresh: dict[str, fgpt.LoRA]
    train: dict[str, fgpt.Batch]
    test: dict[str, fgpt.Batch]

    def origin(self) -> Tree:
        return {path: x.b for path, x in self.fresh.items()}

    def adapt(self, bs: Tree) -> fgpt.GPT:
        return fgpt.adapt(self.base, {path: replace(x, b=bs[path]) for path, x in self.fresh.items()})

    def logits(self, bs: Tree, batch: fgpt.Batch) -> Float[Tensor, "n vocab"]:
        params = self.adapt(bs)
        return fgpt.logits(params, loss_hidden(params, batch))

    def models(self) -> dict[str, Model]:
        return {"as usual": self.logits, "tangent": tangent_model(self.logits, self.origin())}


def build(size: Size, seed: int) -> Problem:
    base, rows = fgpt.load("nano"), rows_by_kind(KINDS, 1000)
    fresh: Any = fgpt.lora(base, fgpt.key(seed), size.rank)
    train, test = {}, {}
    for kind, batch in rows.items():
        order = torch.randperm(len(batch.tokens), generator=fgpt.fold_in(fgpt.key(seed), kind))
        test[kind], train[kind] = take(batch, order[: size.held_out]), take(batch, order[size.held_out :])
    return Problem(base, fresh, train, test)


def nll(logits: Float[Tensor, "n vocab"], batch: fgpt.Batch) -> tuple[Tensor, Tensor]:
    """(Σ weight · nll, Σ weight), as `fgpt.nll` has them of a model's params."""
    losses = F.cross_entropy(logits, at_loss(batch.targets, batch), reduction="none")
    weights = at_loss(batch.weights, batch)
    return (weights * losses).sum(), weights.sum()


def train(model: Model, problem: Problem, kind: str, size: Size, lr: float, seed: int) -> tuple[Tree, list[float]]:
    """The trained Bs, and the seconds of each step."""
    optimizer = fgpt.adamw(lr)
    step = fgpt.make_step(lambda bs, frozen, batch, rng: nll(model(bs, batch), batch), optimizer)
    state, rows, seconds = fgpt.init_state(problem.origin(), optimizer), problem.train[kind], []
    for t in range(size.steps):
        indices = torch.randperm(len(rows.tokens), generator=fgpt.fold_in(fgpt.key(seed), t))[: size.batch]
        begin = time.perf_counter()
        state, _ = step(state, None, [take(rows, indices)], None)
        seconds.append(time.perf_counter() - begin)
    return state.trainable, seconds


def loss(model: Model, bs: Tree, batch: fgpt.Batch) -> float:
    total, weight = nll(model(bs, batch), batch)
    return float(total / weight)


def add(changes: Sequence[Tree], factor: float) -> Tree:
    """Of Bs, which are changes themselves as they begin at 0."""
    return tree_map(lambda *xs: factor * torch.stack(xs).sum(0), *changes)


class Result(NamedTuple):
    """Mean losses over the kinds.

    Args:
        before: Of the base.
        alone: Of each adapter on its own kind.
        sums: Of the sum of all, by its factor.
        seconds: The median of a step.
    """

    before: float
    alone: float
    sums: dict[float, float]
    seconds: float


def measure(model: Model, problem: Problem, size: Size, lr: float, seed: int) -> Result:
    trained = {kind: train(model, problem, kind, size, lr, seed) for kind in KINDS}
    test = problem.test
    alone = [loss(model, trained[kind][0], test[kind]) for kind in KINDS]
    sums: dict[float, float] = {}
    for factor in FACTORS:
        bs = add([trained[kind][0] for kind in KINDS], factor)
        sums[factor] = statistics.mean(loss(model, bs, test[kind]) for kind in KINDS)
    before = statistics.mean(loss(model, problem.origin(), test[kind]) for kind in KINDS)
    seconds = statistics.median(x for _, times in trained.values() for x in times)
    return Result(before, statistics.mean(alone), sums, seconds)


def kernel(problem: Problem, size: Size) -> Float[Tensor, "kinds kinds"]:
    """The mean cosine of the gradients of two rows by their kinds, without that of a row with itself."""
    rows = [take(problem.train[kind], [i]) for kind in KINDS for i in range(size.ntk_rows)]

    def row_loss(bs: Tree, row: fgpt.Batch) -> Float[Tensor, ""]:
        return fgpt.nll(problem.adapt(bs), row)[0]

    matrix = empirical_ntk(row_loss, problem.origin(), rows)
    norms = matrix.diagonal().sqrt()
    cosines = (matrix / norms[:, None] / norms).fill_diagonal_(0)
    n, k = size.ntk_rows, len(KINDS)
    totals = cosines.view(k, n, k, n).sum((1, 3))
    return totals / (n * n - n * torch.eye(k))


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Result]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a few steps of small batches")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of everything")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate")
    options = parser.parse_args(arguments)
    size, seeds = (TINY, 1) if options.tiny else (FULL, options.seeds)
    results: dict[str, list[Result]] = {}
    for seed in range(seeds):
        problem = build(size, seed)
        for name, model in problem.models().items():
            result = measure(model, problem, size, options.lr, seed)
            results.setdefault(name, []).append(result)
            best = min(result.sums, key=result.sums.__getitem__)
            print(
                f"seed {seed}, {name}: {result.before:.3f} before, {result.alone:.3f} alone, {result.sums[best]:.3f} "
                f"at {best} of the sum, {result.sums[1.0]:.3f} at the sum; {result.seconds:.3f} s a step",
                flush=True,
            )
    begin = time.perf_counter()
    table = kernel(build(size, 0), size)
    print(f"mean cosine of the gradients of rows ({time.perf_counter() - begin:.1f} s):")
    for kind, row in zip(KINDS, table, strict=True):
        print(f"{kind:>6} " + " ".join(f"{x:6.3f}" for x in row))
    return results


if __name__ == "__main__":
    main()
