"""Train on several gloo processes, and print as JSON how far the result is from that of one.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/scripts/data_parallel.py
"""

import torch
import torch.distributed as dist
from gloo_report import gloo_report, worst_of_ranks
from torch import Tensor

import fgpt
from fgpt.distributed import ALONE
from fgpt.tree import leaves

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
        report.update(worst_of_ranks(report))


if __name__ == "__main__":
    main()
