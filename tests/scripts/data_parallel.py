"""Train on several gloo processes, and print as JSON how far the result is from that of one.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/scripts/data_parallel.py
"""

from typing import Any

import torch
import torch.distributed as dist
from gloo_report import gloo_report, worst_of_ranks
from torch import Tensor

import fgpt
from fgpt.distributed import ALONE
from fgpt.optim_zero import gather_state, split_state
from fgpt.tree import leaves, nbytes, tree_map

STEPS, MICRO_BATCHES = 20, 4
CONFIG = fgpt.Config(n_layer=2, n_head=2, d_model=64, n_ctx=24, vocab_size=31, d_mlp=64)


def micro_batch(i: int) -> fgpt.Batch:
    """Of 1 to 3 rows of other lengths and weights each time."""
    rng = torch.Generator().manual_seed(i)
    size = (1 + i % 3, 8 + i % 5)
    tokens, targets = (torch.randint(31, size, generator=rng) for _ in range(2))
    return fgpt.Batch(tokens, targets, (torch.rand(size, generator=rng) > 0.3 + 0.1 * (i % 4)).float())


def loss(adapters: fgpt.Adapters, params: fgpt.GPT, batch: fgpt.Batch, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    return fgpt.nll(fgpt.adapt(params, adapters, rng=seed), batch)


def train(params: fgpt.GPT, num_micro_batches: int, world: fgpt.World = ALONE) -> tuple[fgpt.State, list[float]]:
    optimizer = fgpt.adamw(2e-3)
    step = fgpt.make_step(loss, optimizer, world=world)
    state = fgpt.init_state(fgpt.lora(params, fgpt.key(1), rank=4, dropout=0.1), optimizer)
    figures: list[float] = []
    for i in range(STEPS):
        batches = [micro_batch(num_micro_batches * i + j) for j in range(num_micro_batches)]
        state, metrics = step(state, params, batches, fgpt.fold_in(fgpt.key(9), i))
        figures += [float(metrics.loss), float(metrics.grad_norm), float(metrics.weight)]
    return state, figures


def train_in_parts(report: dict[str, Any], name: str, optimizer: fgpt.Optimizer, params: fgpt.GPT) -> None:
    """Full tuning, the state of the optimizer in parts: to the bit what it is without; saved whole, and read again."""
    trainable, here = fgpt.trainable_leaves(params), fgpt.world()
    zero = fgpt.zero_redundancy(optimizer)
    states = [fgpt.init_state(trainable, optimizer), fgpt.init_state(trainable, zero)]
    steps = [fgpt.make_step(loss, kind, world=here) for kind in (optimizer, zero)]
    report[f"size, {name}"] = float(nbytes(states[1].opt_state) > 1.1 / here.size * nbytes(states[0].opt_state))
    for i in range(4):
        batches = [micro_batch(MICRO_BATCHES * i + j) for j in range(MICRO_BATCHES)]
        states = [step(state, params, batches, None)[0] for step, state in zip(steps, states, strict=True)]
        part, whole = states[1].opt_state, gather_state(optimizer, states[1].opt_state, states[1].trainable)
        report[f"state {i}, {name}"] = different(whole, states[0].opt_state)
        report[f"trainable {i}, {name}"] = different(states[1].trainable, states[0].trainable)
        report[f"part {i}, {name}"] = different(split_state(optimizer, whole, states[1].trainable), part)
    averages = [kind.evaluation_params(s.opt_state, s.trainable) for kind, s in zip((optimizer, zero), states)]
    report[f"evaluated, {name}"] = different(*averages)


def update_odd_leaves(report: dict[str, Any]) -> None:
    """A scalar, leaves of no rows and of fewer than there are processes, of other dtypes; and a scalar alone."""
    rng = fgpt.key(3)
    odd = {
        "scalar": torch.tensor(2.0),
        "row": torch.randn(1, 5, generator=rng),
        "empty": torch.zeros(0, 3),
        "double": torch.randn(4, 2, generator=rng).double(),
        "half": torch.randn(7, generator=rng).bfloat16(),
    }
    optimizer = fgpt.adamw(0.1, weight_decay=0.1)
    zero = fgpt.zero_redundancy(optimizer)
    for name, tree in {"odd": odd, "scalar": {"scalar": odd["scalar"]}}.items():
        whole, in_parts = (tree, optimizer.init(tree)), (tree, zero.init(tree))
        for _ in range(3):
            grads = tree_map(lambda x: torch.randn(x.shape, generator=rng).to(x.dtype), tree)
            whole, in_parts = optimizer.update(grads, whole[1], whole[0]), zero.update(grads, in_parts[1], in_parts[0])
        report[f"leaves in parts, {name}"] = different(in_parts[0], whole[0])
        report[f"state in parts, {name}"] = different(gather_state(optimizer, in_parts[1], tree), whole[1])


def different(a: Any, b: Any) -> float:
    """1 if a leaf differs in a bit."""
    x, y = leaves({"": a}), leaves({"": b})
    return float(x.keys() != y.keys() or not all(torch.equal(x[path], y[path]) for path in x))


def main() -> None:
    with gloo_report() as report:
        here = fgpt.world()
        base = fgpt.init(CONFIG, fgpt.key(0))
        for name, params in (("fp32", base), ("nf4", fgpt.quantize(base, "nf4"))):
            for count in (MICRO_BATCHES, 1):  # of one, all ranks but the first have none
                together, figures = train(params, count, here)
                alone, expected = train(params, count)
                vectors = [torch.cat([x.flatten() for x in leaves(s.trainable).values()]) for s in (together, alone)]
                report[f"leaves, {name}, {count}"] = float((vectors[0] - vectors[1]).norm() / vectors[1].norm())
                worst = max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(figures, expected, strict=True))
                report[f"metrics, {name}, {count}"] = worst
                of_first_rank = vectors[0].clone()
                dist.broadcast(of_first_rank, 0)
                report[f"ranks, {name}, {count}"] = float((of_first_rank != vectors[0]).sum())
        train_in_parts(report, "adamw", fgpt.adamw(1e-2, weight_decay=0.1), base)
        train_in_parts(report, "schedule-free", fgpt.schedule_free_adamw(1e-2), base)
        train_in_parts(report, "average, bf16", fgpt.with_ema(fgpt.adamw(1e-2), 0.9), tree_map(Tensor.bfloat16, base))
        update_odd_leaves(report)
        report.update(worst_of_ranks(report))


if __name__ == "__main__":
    main()
