"""A learning-rate schedule that is learned: the rate of each step moves down the derivative of the final validation
loss through the whole training, against the best of eight schedules.

    python -m experiments.research.learning_rates [--steps 60 --rounds 10]

The eight are four peak rates, each constant and falling linearly after a warmup. The learned one begins as the best of
them; every round is a training and its metagradient, which Adam follows in the logarithm of the rates. Schedules are
chosen by validation rows and compared on other rows.

Source: Engstrom et al. 2025, "Optimizing ML Training with Metagradient Descent", section 4.4.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad

import fgpt
from experiments.research.attribution import WIDTH, join, read_rows, tuning_loss
from fgpt.adapter_types import Adapters
from fgpt.cli.training.examples import NANO_TASKS
from fgpt.optim import linear_schedule
from fgpt.train_step import State
from fgpt.transforms.unroll import metagradient, unroll

PEAKS = (1e-3, 3e-3, 1e-2, 3e-2)
EPS_ROOT = 1e-6
"""Under AdamW's root, so that it has a derivative where a moment is 0."""
META_LR = 0.05
"""Of Adam on log rates."""


@dataclass(frozen=True)
class Training:
    """A LoRA on nano that reads its batches in order, each with a rate of its own."""

    base: fgpt.GPT
    batches: list[fgpt.Batch]
    seed: int

    def start(self) -> State:
        return fgpt.init_state(fgpt.lora(self.base, fgpt.key(self.seed), rank=4), fgpt.adamw(1.0, eps_root=EPS_ROOT))

    def advance(self, state: State, t: int, rates: Float[Tensor, " steps"]) -> State:
        step = fgpt.make_step(tuning_loss, fgpt.adamw(rates[t], eps_root=EPS_ROOT))
        return step(state, self.base, [self.batches[t]], None)[0]

    def loss(self, adapters: Adapters, rows: fgpt.Batch) -> Float[Tensor, ""]:
        return fgpt.loss(fgpt.adapt(self.base, adapters), rows)


def schedules(steps: int) -> dict[str, Float[Tensor, " steps"]]:
    """The rates of the eight, by name."""
    result: dict[str, Tensor] = {}
    for peak in PEAKS:
        falling = linear_schedule(peak, steps, warmup_steps=steps // 10)
        result[f"constant {peak:g}"] = torch.full((steps,), peak)
        result[f"linear {peak:g}"] = torch.stack([torch.as_tensor(falling(torch.tensor(t))) for t in range(steps)])
    return result


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """The losses of the chosen schedules: on validation rows, and on other rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="updates of a training")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="rows of an update")
    parser.add_argument("--rounds", type=int, default=10, help="trainings that the schedule learns from")
    parser.add_argument("--heldout", type=int, default=80, help="rows of the validation, and as many others")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rows, draw = read_rows(NANO_TASKS, WIDTH), fgpt.key(options.seed)
    validation, test = join(rows[: options.heldout]), join(rows[options.heldout : 2 * options.heldout])
    rows = rows[2 * options.heldout :]
    chosen = torch.randint(len(rows), (options.steps, options.micro_batch_size), generator=draw).tolist()
    training = Training(fgpt.load("nano"), [join([rows[i] for i in step]) for step in chosen], options.seed)

    def measure(name: str, rates: Tensor) -> tuple[float, float, Any]:
        result = unroll(training.advance, training.start(), rates, options.steps)
        with torch.no_grad():
            losses = [float(training.loss(result.final.trainable, part)) for part in (validation, test)]
        print(f"{name}: validation {losses[0]:.4f}, test {losses[1]:.4f}", flush=True)
        return losses[0], losses[1], result

    eight = {name: measure(name, rates)[:2] for name, rates in schedules(options.steps).items()}
    best = min(eight, key=lambda name: eight[name][0])
    log_rates = schedules(options.steps)[best].clamp(min=1e-6).log().requires_grad_()
    optimizer = torch.optim.Adam([log_rates], lr=META_LR)
    learned = float("inf"), float("inf")
    for i in range(options.rounds):
        rates = log_rates.detach().exp()
        value, other, result = measure(f"round {i}", rates)
        learned = min(learned, (value, other))
        cotangent = grad(training.loss)(result.final.trainable, validation)
        by_rates = metagradient(training.advance, result, rates, cotangent).meta
        log_rates.grad = by_rates * rates
        optimizer.step()
    print(
        f"best of eight, {best}: validation {eight[best][0]:.4f}, test {eight[best][1]:.4f}; learned: "
        f"{learned[0]:.4f}, {learned[1]:.4f}",
        flush=True,
    )
    print("rates " + " ".join(f"{x:.2g}" for x in log_rates.detach().exp()[:: max(1, options.steps // 12)].tolist()))
    names = ("best validation", "best test", "learned validation", "learned test")
    return dict(zip(names, (*eight[best], *learned), strict=True))


if __name__ == "__main__":
    main()
