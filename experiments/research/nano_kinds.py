"""The instructions of nano by their kind, as tasks: what a place is called, what somebody loves, a title, .."""

from collections.abc import Sequence

import torch

import fgpt
from fgpt.cli.training.examples import NANO_TASKS
from fgpt.cli.training.nano_rows import read_tasks
from fgpt.data.packing import collate
from fgpt.data.prompt_templates import PLAIN, encode

WIDTH = 80
"""Positions of a row: longer ones are left out."""


def rows_by_kind(kinds: Sequence[str], count: int, width: int = WIDTH) -> dict[str, fgpt.Batch]:
    """The first rows of each kind, all of one width: what follows the answer has weight 0."""
    tokenizer, tasks = fgpt.tokenizer("nano"), read_tasks(NANO_TASKS)
    rows: dict[str, fgpt.Batch] = {}
    for kind in kinds:
        examples = [encode(task, PLAIN, tokenizer) for task in tasks if task.kind == kind]
        short = [example for example in examples if len(example.tokens) <= width][:count]
        batch = collate([[example] for example in short], width)
        rows[kind] = fgpt.Batch(batch.tokens, batch.targets, batch.weights)
    return rows


def take(rows: fgpt.Batch, indices: Sequence[int] | torch.Tensor) -> fgpt.Batch:
    """Some of the rows, with logits only where there is a weight."""
    index = torch.as_tensor(indices)
    tokens, targets, weights = rows.tokens[index], rows.targets[index], rows.weights[index]
    return fgpt.Batch(tokens, targets, weights, loss_positions=weights.flatten().nonzero().flatten())
