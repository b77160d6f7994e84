"""An audit of private trainings: what ε somebody can prove who guesses, from the adapter alone, which rows were read.

    python -m experiments.research.privacy_audit [--rows 500 --steps 100 --epsilon 2 8]

Half of the rows, by fair coins, are in the training. A row's score is how far the training has lowered its loss. Of the
guesses from these scores follows a lower bound of ε that holds with a confidence of 95 %. It must be at most the ε of
the accountant, or the mechanism is broken; without noise the same attack must prove much, or it shows nothing. Model
and rows are small and random, so that the model learns rows by heart.

Needs opake-auditing besides fgpt[privacy]. Source: Steinke et al. 2023, "Privacy Auditing with One (1) Training Run";
Xiang et al. 2025 for the bound.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fgpt
from fgpt.train_step import Step
from fgpt.transforms.privacy import GaussianMechanism, private_step, sample_lot
from fgpt.transforms.privacy_accounting import find_noise_multiplier, spent_epsilon
from fgpt.tree import tree_map

DELTA = 1e-5
CONFIDENCE = 0.95
ROW_LENGTH = 24


def main(arguments: Sequence[str] | None = None) -> dict[float, float]:
    """The proven ε by the ε of the accountant; infinite is the training without noise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="rows that may be read; 500, or 50 if tiny")
    parser.add_argument("--steps", type=int, help="100, or 30 if tiny")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[2.0, 8.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="as a test runs it")
    options = parser.parse_args(arguments)
    count = options.rows or (50 if options.tiny else 500)
    steps = options.steps or (30 if options.tiny else 100)
    base = fgpt.init(fgpt.Config(1, 2, 64, 64, 97, 256), fgpt.key(0))
    rows = random_rows(count, base.cfg.vocab_size, fgpt.key(options.seed))
    rate, proven = 0.5, dict[float, float]()
    for epsilon in [*options.epsilon, math.inf]:
        sigma, spent = 0.0, math.inf
        if epsilon < math.inf:
            plan = {"delta": DELTA, "sampling_rate": rate, "steps": steps}
            sigma = find_noise_multiplier(epsilon, **plan)
            spent = spent_epsilon(sigma, **plan)
        proven[epsilon] = audit(base, rows, sigma, rate=rate, steps=steps, seed=options.seed)
        verdict = "holds" if proven[epsilon] <= spent else "BROKEN"
        print(
            f"noise {sigma:.3f}: epsilon {spent:.3f} by the accountant, {proven[epsilon]:.3f} proven: {verdict}",
            flush=True,
        )
    return proven


def random_rows(count: int, vocab_size: int, rng: torch.Generator) -> fgpt.Batch:
    """Rows of random tokens: nothing but having read them makes one likely."""
    tokens = torch.randint(vocab_size, (count, ROW_LENGTH + 1), generator=fgpt.fold_in(rng, "rows"))
    return fgpt.Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(count, ROW_LENGTH))


def audit(base: fgpt.GPT, rows: fgpt.Batch, sigma: float, *, rate: float, steps: int, seed: int) -> float:
    """The ε that is proven of a training with this noise on the rows that a coin has chosen."""
    from opake import auditing
    from opake.random import key

    count = len(rows.tokens)
    coins = auditing.coin_flip(range(count), num_canaries=count, key=key(seed))
    members = sorted(coins.train_indices(count))
    optimizer = fgpt.adamw(2e-2)
    mechanism = GaussianMechanism(max_norm=1.0, noise_multiplier=sigma, lot_size=rate * count / 2)
    step: Step = private_step(row_loss, optimizer, mechanism)
    fresh = fgpt.lora(base, fgpt.key(1), rank=8)
    state = fgpt.init_state(fresh, optimizer)
    for i in range(steps):
        rng = fgpt.fold_in(fgpt.key(seed + 1), i)
        lot = [members[j] for j in sample_lot(len(members), rate, rng)]
        batches = [tree_map(lambda x, lot=lot: x[lot], rows)] if lot else []
        state, _ = step(state, base, batches, rng)
    scores = losses(base, fresh, rows) - losses(base, state.trainable, rows)
    estimate = auditing.one_run(
        auditing.canary_scores(scores.numpy(), canary_indices=list(range(count))), coin_flip=coins
    )
    return float(estimate.eps_delta().epsilon_at(delta=DELTA, significance=1 - CONFIDENCE))


def row_loss(adapters: Any, base: Any, batch: fgpt.Batch, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    return fgpt.nll(fgpt.adapt(base, adapters, rng=seed), batch)


def losses(base: fgpt.GPT, adapters: Any, rows: fgpt.Batch) -> Tensor:
    """The loss of each row."""
    with torch.no_grad():
        logits = fgpt.apply(fgpt.adapt(base, adapters), rows.tokens)
    return torch.nn.functional.cross_entropy(logits.mT, rows.targets, reduction="none").sum(1)


if __name__ == "__main__":
    main()
