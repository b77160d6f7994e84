"""A hypernetwork of adapters: each example has a LoRA of its own, made from the embedding of its prompt inside a
`vmap`, and what makes it is trained end to end by `make_step`. Beside it, one LoRA for all, of the same rank.

    python -m experiments.research.hypernetwork            # --tiny: two updates, one seed

    e = normalize(mean of the prompt's embeddings)        c = k softmax(W e)        ΔW = s Σ_j c_j B_j A_j

The network is a bank of k LoRAs and W, which begins at 0: then c = 1, and the sum is one LoRA of k times the rank, the
same as the one beside it. Printed are losses on rows that no training reads, in nats per token, before and after.

Source: Ha et al. 2016, "HyperNetworks"; Mahabadi et al. 2021, "Parameter-efficient Multi-task Fine-tuning for
Transformers via Shared Hypernetworks".
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
from torch.func import vmap

import fgpt
from experiments.research.nano_kinds import rows_by_kind
from fgpt.rng import fold_in
from fgpt.tree import node, num_elements, tree_map

KINDS = ("where", "like", "find", "what", "who", "feel", "title")


class Size(NamedTuple):
    """How much is trained and evaluated.

    Args:
        members: k, LoRAs of the bank.
        rank: Of each, on queries, values and the MLP's first matrix.
        updates: Of AdamW.
        batch: Rows of an update.
        held_out: Rows of each kind that no training reads.
    """

    members: int
    rank: int
    updates: int
    batch: int
    held_out: int


FULL = Size(members=4, rank=2, updates=100, batch=8, held_out=8)
TINY = Size(members=2, rank=1, updates=2, batch=2, held_out=1)


@node
class Hypernetwork:
    """What is trained.

    Args:
        bank: k LoRAs as one: rows of A and columns of B are those of the first, the second, ..
        weight: W.
    """

    bank: dict[str, fgpt.LoRA]
    weight: Float[Tensor, "k d_model"]

    def adapters(self, embedding: Float[Tensor, " d_model"]) -> dict[str, fgpt.LoRA]:
        """Those of one example."""
        k = len(self.weight)
        factors = k * (self.weight @ embedding).softmax(-1)

        def mix(x: fgpt.LoRA) -> fgpt.LoRA:
            return replace(x, b=x.b * factors.repeat_interleave(x.b.shape[1] // k))

        return {path: mix(x) for path, x in self.bank.items()}


def prompt_embeddings(base: fgpt.GPT, batch: fgpt.Batch) -> Float[Tensor, "rows d_model"]:
    """The mean embedding of each prompt, of unit mean square. A prompt ends where the first weight is."""
    is_prompt = (batch.weights.cumsum(-1) == 0).float()
    total = torch.einsum("rs,rsd->rd", is_prompt, fgpt.embed(batch.tokens, base.wte.w))
    return F.normalize(total, dim=-1) * total.shape[-1] ** 0.5


def hypernetwork_loss(
    network: Hypernetwork, base: fgpt.GPT, batch: fgpt.Batch, seed: Tensor | None
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(Σ weight · nll, Σ weight), each row by its own adapters."""

    def of_row(embedding: Float[Tensor, " d_model"], row: fgpt.Batch) -> tuple[Tensor, Tensor]:
        return fgpt.nll(fgpt.adapt(base, network.adapters(embedding)), row)

    totals, weights = vmap(of_row)(prompt_embeddings(base, batch), batch)
    return totals.sum(), weights.sum()


def shared_loss(
    adapters: fgpt.Adapters, base: fgpt.GPT, batch: fgpt.Batch, seed: Tensor | None
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    return fgpt.nll(fgpt.adapt(base, adapters), batch)


class Result(NamedTuple):
    """Losses on the held-out rows of all kinds, and the seconds of the median step."""

    before: float
    after: float
    seconds: float


def train(
    loss: Callable[..., Any], trainable: Any, base: fgpt.GPT, size: Size, *, lr: float, seed: int
) -> tuple[Any, Result]:
    optimizer = fgpt.adamw(lr)
    step, state = fgpt.make_step(loss, optimizer), fgpt.init_state(trainable, optimizer)
    by_kind = rows_by_kind(KINDS, 1000).values()
    test, rows = (
        tree_map(lambda *xs: torch.cat(xs), *[tree_map(lambda x, part=part: x[part], rows) for rows in by_kind])
        for part in (slice(size.held_out), slice(size.held_out, None))
    )

    def held_out_loss(trainable: Any) -> float:
        total, weight = loss(trainable, base, test, None)
        return float(total / weight)

    seconds, before = [], held_out_loss(trainable)
    for t in range(size.updates):
        order = torch.randperm(len(rows.tokens), generator=fold_in(fgpt.key(seed), t))
        batch = tree_map(lambda x, i=order[: size.batch]: x[i], rows)
        begin = time.perf_counter()
        state, _ = step(state, base, [batch], None)
        seconds.append(time.perf_counter() - begin)
    return state.trainable, Result(before, held_out_loss(state.trainable), statistics.median(seconds))


def build(base: fgpt.GPT, size: Size, seed: int) -> Hypernetwork:
    bank: Any = fgpt.lora(base, fgpt.key(seed), size.members * size.rank, target=r".*\.(q|v|up)")
    return Hypernetwork(bank, torch.zeros(size.members, base.cfg.d_model))


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Result]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="two updates, one seed")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of both")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate of AdamW")
    options = parser.parse_args(arguments)
    size, seeds = (TINY, 1) if options.tiny else (FULL, options.seeds)
    base = fgpt.load("nano")
    results: dict[str, list[Result]] = {"one LoRA": [], "hypernetwork": []}
    for seed in range(seeds):
        network = build(base, size, seed)
        sides = {"one LoRA": (shared_loss, network.bank), "hypernetwork": (hypernetwork_loss, network)}
        for name, (loss, trainable) in sides.items():
            result = train(loss, trainable, base, size, lr=options.lr, seed=seed)[1]
            results[name].append(result)
            print(
                f"seed {seed}, {name}: {result.before:.3f} before, {result.after:.3f} after; "
                f"{num_elements(trainable):,} elements, {result.seconds:.3f} s a step",
                flush=True,
            )
    return results


if __name__ == "__main__":
    main()
