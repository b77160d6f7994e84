"""Rows whose answers were shuffled are found by the derivative of a held-out loss by the weight of each row.

    python -m experiments.research.mislabeled_rows [--share 0.4 --rounds 6]

A LoRA on nano is trained on rows of which a share has got another row's answer. The loss of a few clean rows after the
whole training is differentiated by all weights at once, and the weights go down their gradient, between 0 and 1, for
some rounds. Printed are the area under the curve (AUC) with which the weights tell the shuffled rows from the others,
and the loss of other held-out rows: of the clean rows, of all, of all with the learned weights, and of the clean rows
alone.

Source: Engstrom et al. 2025, "Optimizing ML Training with Metagradient Descent", section 4.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.func import grad

import fgpt
from experiments.research.attribution import NANO_HELDOUT, NANO_TASKS, QUERY_WIDTH, WIDTH, Training, join, read_rows
from fgpt.adapter_types import Adapters
from fgpt.cli.training.nano_rows import Task, read_tasks
from fgpt.data.packing import collate
from fgpt.data.prompt_templates import PLAIN, encode
from fgpt.transforms.unroll import metagradient, unroll


def shuffle_answers(
    tasks: Sequence[Task], share: float, rng: torch.Generator
) -> tuple[list[Task], Bool[Tensor, " rows"]]:
    """The rows, of which a share has the answer of another row; and which they are."""
    order = torch.randperm(len(tasks), generator=rng)[: round(share * len(tasks))].tolist()
    shuffled = [*tasks]
    for index, other in zip(order, [*order[1:], order[0]], strict=True):
        shuffled[index] = replace(tasks[index], output=tasks[other].output)
    is_other = torch.tensor([row.output != task.output for row, task in zip(shuffled, tasks, strict=True)])
    return shuffled, is_other


def auc(scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"]) -> float:
    """The share of pairs of a positive and another row in which the positive one has the higher score, ties half."""
    pairs = scores[positive][:, None] - scores[~positive]
    return float(((pairs > 0).double() + (pairs == 0).double() / 2).mean())


def main(arguments: Sequence[str] | None = None) -> float:
    """The last AUC."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=240, help="training rows")
    parser.add_argument("--share", type=float, default=0.4, help="share of the rows whose answers are shuffled")
    parser.add_argument("--steps", type=int, default=60, help="updates of a training")
    parser.add_argument("--rounds", type=int, default=6, help="metagradients")
    parser.add_argument("--rate", type=float, default=0.2, help="change of a weight in a round, for a slope of one standard deviation")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    tokenizer = fgpt.tokenizer("nano")
    short = [task for task in read_tasks(NANO_TASKS) if len(encode(task, PLAIN, tokenizer).tokens) <= WIDTH]
    tasks, is_shuffled = shuffle_answers(short[: options.rows], options.share, fgpt.key(options.seed))
    examples = [encode(task, PLAIN, tokenizer) for task in tasks]
    fits = torch.tensor([len(example.tokens) <= WIDTH for example in examples])
    is_shuffled = is_shuffled[fits]
    batches = [collate([[example]], WIDTH) for example in examples if len(example.tokens) <= WIDTH]
    heldout = read_rows(NANO_HELDOUT, QUERY_WIDTH)
    validation, test = join(heldout[::2]), join(heldout[1::2])
    training = Training(
        fgpt.load("nano"),
        [fgpt.Batch(x.tokens, x.targets, x.weights) for x in batches],
        [],
        steps=options.steps,
        micro_batch_size=8,
        lr=2e-3,
        eps_root=1e-6,
        seed=options.seed,
    )
    print(f"{len(batches)} rows, {int(is_shuffled.sum())} of them with another's answer", flush=True)

    def test_loss(row_weights: Float[Tensor, " rows"]) -> float:
        trained = unroll(training.advance, training.start(), row_weights, options.steps).final.trainable
        return float(training.query_loss(trained, test))

    def validation_loss(adapters: Adapters) -> Float[Tensor, ""]:
        return training.query_loss(adapters, validation)

    ones = torch.ones(len(batches))
    weights, area = ones, 0.5
    for number in range(1, options.rounds + 1):
        result = unroll(training.advance, training.start(), weights, options.steps)
        slopes = metagradient(training.advance, result, weights, grad(validation_loss)(result.final.trainable)).meta
        weights = (weights - options.rate * slopes / slopes.std()).clamp(0, 1)
        area = auc(-weights, is_shuffled)
        loss = float(validation_loss(result.final.trainable))
        print(f"round {number}: validation loss before {loss:.3f}, AUC {area:.3f} after", flush=True)
    losses = {"all rows": ones, "learned weights": weights, "clean rows": (~is_shuffled).float()}
    figures = {name: test_loss(row_weights) for name, row_weights in losses.items()}
    print(json.dumps({name: round(x, 4) for name, x in figures.items()}), flush=True)
    return area


if __name__ == "__main__":
    main()
