"""A training laid out before its first step: from it, and the state after any step, follows all that comes after."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.runs import Training
from fgpt.data.templates import Example
from fgpt.data.tokenizers import Tokenizer
from fgpt.loss import Batch
from fgpt.optim import Schedule
from fgpt.rng import fold_in
from fgpt.train import Metrics, State, Step
from fgpt.tree import device, leaves, tree_map


@dataclass
class Plan:
    """What `fit` needs, and `replay`."""

    run: Training
    step: Step
    frozen: Any
    batches: Callable[[int], Iterator[list[Batch]]]
    """The micro-batches of one update after the other, without end, from that update on; counted from 0."""
    steps: int
    schedule: Schedule
    rng: torch.Generator
    """Each step takes a key of its own from it, by its number."""
    inputs: str
    """The hash of base and rows: what a checkpoint must have been made from."""
    first: State | None
    """The state before the first step, until it is taken."""
    tokenizer: Tokenizer
    heldout: Callable[[Any], float] | None = None
    """Loss on rows apart, of what is trained."""
    mfu: Callable[[float], float] | None = None
    """Which part of the machine so many tokens a second take."""

    def advance(self, state: State, micro: Sequence[Batch]) -> tuple[State, Metrics]:
        """The step after `state`, with the key of its number, on the device that the state is on."""
        at = device(state.trainable)
        placed = [tree_map(lambda x: x.to(at), batch) for batch in micro]
        return self.step(state, self.frozen, placed, fold_in(self.rng, int(state.step)))

    def take(self) -> State:
        """The state before the first step. It is given away: nobody else holds on to memory that the training lets go
        of with its first step.
        """
        state, self.first = self.first, None
        assert state is not None, "taken already"
        return state


def hashed(base: Any, rows: Sequence[Example] | Sequence[Tensor]) -> str:
    """The hash of a base's leaves and of rows, bit by bit."""
    whole = hashlib.sha256()
    for path, x in leaves(base).items():
        whole.update(f"{path} {x.dtype} {list(x.shape)}".encode())
        _feed(whole, x)
    for row in rows:
        if isinstance(row, Example):
            whole.update(f"{row.prompt} {row.label}".encode())
            whole.update(b"" if row.weight == 1 else f" {row.weight}".encode())
            row = torch.tensor(row.tokens)
        whole.update(f" {len(row)}:".encode())
        _feed(whole, row)
    return whole.hexdigest()


def _feed(whole: Any, x: Tensor) -> None:
    flat: Any = x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    whole.update(flat)
