"""MAML: adapters from which a few gradient steps on a few rows of a new kind of question go far, beside adapters that
are trained on all rows together.

    python -m experiments.research.maml            # --tiny: two updates, one seed

Both see the same rows of the same kinds, in as many updates of the same optimizer:

    meta-learned    min_θ Σ_tasks L(θ_k; query),   θ_{j+1} = θ_j - α ∇L(θ_j; support),  θ_0 = θ
    joint           min_θ Σ_tasks L(θ; support ∪ query)

Then both take k steps on a few rows of kinds that they have never seen, at each of several rates α. Printed are the
losses on other rows of these kinds, in nats per token. The meta-gradient goes through the inner gradients, and all
tasks of an update are one vmap. It needs nothing but `torch.func.grad`; for inner loops that are too long for one graph
`fgpt.transforms.unroll.metagradient` has the same derivative, as `.initial`.

Source: Finn et al. 2017, "Model-Agnostic Meta-Learning", algorithm 1.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, vmap

import fgpt
from experiments.research.nano_kinds import rows_by_kind
from fgpt.rng import fold_in
from fgpt.tree import tree_map

Tree = Any
KINDS = ("where", "like", "find", "what", "who")
NEW_KINDS = ("feel", "title")
RATES = (0.03, 0.1, 0.3, 1.0)
"""α, at which both are tried on the new kinds."""


class Size(NamedTuple):
    """How much is trained and evaluated.

    Args:
        rank: Of the LoRAs, on queries and values.
        width: Positions of a row.
        updates: Of both trainings.
        tasks: Kinds of an update.
        shots: Rows of a support set, and of a query set in training.
        inner_steps: k.
        episodes: Support sets of each new kind.
        test_rows: Rows of a query set of a new kind.
    """

    rank: int
    width: int
    updates: int
    tasks: int
    shots: int
    inner_steps: int
    episodes: int
    test_rows: int


FULL = Size(rank=4, width=72, updates=60, tasks=3, shots=4, inner_steps=2, episodes=4, test_rows=12)
TINY = Size(rank=1, width=72, updates=2, tasks=2, shots=1, inner_steps=1, episodes=1, test_rows=2)


class Episodes(NamedTuple):
    """Tasks, with a leading axis.

    Args:
        support: The rows that inner steps read: [tasks rows seq].
        query: Those that the loss after them is of.
    """

    support: fgpt.Batch
    query: fgpt.Batch


def gradient_steps(
    adapters: Tree, base: fgpt.GPT, support: fgpt.Batch, *, rate: float | Tensor, num_steps: int
) -> Tree:
    """θ_k: steps of gradient descent on the rows. They may be mapped over and differentiated."""
    for _ in range(num_steps):
        grads = grad(lambda a: fgpt.loss(fgpt.adapt(base, a), support))(adapters)
        adapters = tree_map(lambda x, g: x - rate * g, adapters, grads)
    return adapters


def maml_loss(
    adapters: Tree, base: fgpt.GPT, episodes: Episodes, *, rate: float, num_steps: int
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(Σ weight · nll, Σ weight) of the queries after the inner steps of each task."""

    def of_task(support: fgpt.Batch, query: fgpt.Batch) -> tuple[Tensor, Tensor]:
        adapted = gradient_steps(adapters, base, support, rate=rate, num_steps=num_steps)
        return fgpt.nll(fgpt.adapt(base, adapted), query)

    totals, weights = vmap(of_task)(episodes.support, episodes.query)
    return totals.sum(), weights.sum()


def joint_loss(adapters: Tree, base: fgpt.GPT, episodes: Episodes) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(Σ weight · nll, Σ weight) of all rows."""
    params = fgpt.adapt(base, adapters)
    (first, m), (second, n) = fgpt.nll(params, episodes.support), fgpt.nll(params, episodes.query)
    return first + second, m + n


def sample(
    rows: dict[str, fgpt.Batch], rng: torch.Generator, *, tasks: int | None, shots: int, queries: int
) -> Episodes:
    """Rows of some kinds, or of each, drawn without replacement."""
    kinds = list(rows)
    order = torch.randperm(len(kinds), generator=fold_in(rng, "kinds")).tolist()
    support: list[fgpt.Batch] = []
    query: list[fgpt.Batch] = []
    for kind in kinds if tasks is None else [kinds[i] for i in order[:tasks]]:
        chosen = torch.randperm(len(rows[kind].tokens), generator=fold_in(rng, kind))[: shots + queries]
        support.append(tree_map(lambda x, i=chosen[:shots]: x[i], rows[kind]))
        query.append(tree_map(lambda x, i=chosen[shots:]: x[i], rows[kind]))
    return Episodes(*(tree_map(lambda *xs: torch.stack(xs), *batches) for batches in (support, query)))


def train(loss: Callable[..., Any], base: fgpt.GPT, size: Size, *, lr: float, seed: int) -> Tree:
    """The adapters after all updates by `loss(adapters, base, episodes)`."""
    optimizer = fgpt.adamw(lr)
    step = fgpt.make_step(lambda adapters, base, episodes, rng: loss(adapters, base, episodes), optimizer)
    state = fgpt.init_state(initial(base, size, seed), optimizer)
    rows = rows_by_kind(KINDS, 1000, size.width)
    for t in range(size.updates):
        rng = fold_in(fgpt.key(seed), t)
        episodes = sample(rows, rng, tasks=size.tasks, shots=size.shots, queries=size.shots)
        state, _ = step(state, base, [episodes], None)
    return state.trainable


def initial(base: fgpt.GPT, size: Size, seed: int) -> Tree:
    return fgpt.lora(base, fgpt.key(seed), size.rank, target=r".*\.(q|v)")


def losses_on_new_kinds(adapters: Tree, base: fgpt.GPT, size: Size) -> list[float]:
    """Before any step, and after k steps at each rate: means over kinds and episodes, the same for all adapters."""
    rows, losses = rows_by_kind(NEW_KINDS, 1000, size.width), []
    for rate in (0.0, *RATES):
        each: list[float] = []
        for i in range(size.episodes):
            episodes = sample(rows, fold_in(fgpt.key(1000), i), tasks=None, shots=size.shots, queries=size.test_rows)
            total, weight = maml_loss(adapters, base, episodes, rate=rate, num_steps=size.inner_steps)
            each.append(float(total / weight))
        losses.append(statistics.mean(each))
    return losses


def main(arguments: Sequence[str] | None = None) -> dict[str, list[list[float]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="two updates, one seed")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of both")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate of AdamW")
    parser.add_argument("--rate", type=float, default=0.3, help="alpha of the inner steps in training")
    options = parser.parse_args(arguments)
    size, seeds = (TINY, 1) if options.tiny else (FULL, options.seeds)
    base = fgpt.load("nano")

    def meta_loss(adapters: Tree, base: fgpt.GPT, episodes: Episodes) -> tuple[Tensor, Tensor]:
        return maml_loss(adapters, base, episodes, rate=options.rate, num_steps=size.inner_steps)

    sides = {"joint": joint_loss, "meta-learned": meta_loss}
    results: dict[str, list[list[float]]] = {name: [] for name in sides}
    print(f"losses on new kinds: before, and after {size.inner_steps} steps at {', '.join(map(str, RATES))}")
    for seed in range(seeds):
        for name, loss in sides.items():
            begin = time.perf_counter()
            adapters = train(loss, base, size, lr=options.lr, seed=seed)
            seconds = (time.perf_counter() - begin) / size.updates
            losses = losses_on_new_kinds(adapters, base, size)
            results[name].append(losses)
            figures = " ".join(f"{x:.3f}" for x in losses)
            print(f"seed {seed}, {name}: {figures}; {seconds:.2f} s an update", flush=True)
    return results


if __name__ == "__main__":
    main()
