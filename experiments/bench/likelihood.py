"""Log-likelihoods of answers to choose from, each beginning read once, beside a forward pass over every whole row.

Tokens are random: what they are does not change how long a model takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from experiments.bench.timing import Result, hardware, in_fresh_processes, report, time_interleaved, times
from fgpt.data.examples import Example
from fgpt.data.packing import collate
from fgpt.evaluation.likelihood import loglikelihood
from fgpt.evaluation.request_batches import Request
from fgpt.io.models import load
from fgpt.losses import nll
from fgpt.model import GPT
from fgpt.rng import key

CPU = torch.device("cpu")
CHOICES = 4
"""Answers to a question."""


@dataclass(frozen=True)
class Shape:
    """How many tokens requests have: `shared` that all of them begin with, `context` of each question, `answer`."""

    shared: int
    context: int
    answer: int

    def __str__(self) -> str:
        begins = f"{self.shared} tokens of examples, " if self.shared else ""
        return f"{begins}questions of {self.context} tokens, answers of {self.answer}"


SHAPES = (Shape(0, 60, 25), Shape(0, 600, 25), Shape(300, 60, 5))


@dataclass(frozen=True)
class Likelihood:
    """Seconds of scoring the answers to some questions, against one row for each answer."""

    model: str = "smollm2"
    """A base: nano, smollm2 or a folder."""
    questions: int = 4
    """Each has four answers."""
    processes: int = 3
    """Fresh processes, one after the other: medians and ranges over them are reported."""
    repeats: int = 3
    """Rounds in each process."""
    out: Path = Path("runs/bench")


def likelihood(bench: Likelihood) -> None:
    """Time both sides and write runs/bench/likelihood.json and likelihood.md. Raises InputError."""
    notes = [
        f"{hardware(CPU)}; {bench.model}, fp32; {bench.questions} questions of {CHOICES} answers, 8 rows at a time"
    ]
    notes.append(f"medians and ranges of {bench.processes} processes, each of {bench.repeats} alternating rounds")
    results = in_fresh_processes(bench.processes, measure, bench)
    report("likelihood", ("shared", "whole rows"), results, notes, bench.out)


def measure(bench: Likelihood) -> list[Result]:
    params = load(bench.model)
    results: list[Result] = []
    for shape in SHAPES:
        requests = requests_of(shape, bench.questions, params.cfg.vocab_size)
        calls = {
            "shared": partial(loglikelihood, params, requests),
            "whole": partial(of_whole_rows, params, requests),
        }
        seconds = time_interleaved({name: [call] * bench.repeats for name, call in calls.items()}, CPU)
        results.append(times(str(shape), seconds["shared"], seconds["whole"]))
    return results


def requests_of(shape: Shape, questions: int, vocab_size: int) -> list[Request]:
    """Pairs of (context, answer), the answers to one question side by side."""
    rng = key(0)

    def draw(count: int) -> list[int]:
        return torch.randint(vocab_size, (count,), generator=rng).tolist()

    shared, requests = draw(shape.shared), list[Request]()
    for _ in range(questions):
        context = shared + draw(shape.context)
        requests += [(context, draw(shape.answer)) for _ in range(CHOICES)]
    return requests


@torch.no_grad()
def of_whole_rows(params: GPT, requests: Sequence[Request], batch_size: int = 8) -> Float[Tensor, " requests"]:
    """The log-likelihood of each continuation, by forward passes over the whole of each row, `batch_size` at a time."""
    sums: list[Tensor] = []
    for begin in range(0, len(requests), batch_size):
        batch_requests = requests[begin : begin + batch_size]
        batch = collate([[Example.completion([*context, *answer], len(context))] for context, answer in batch_requests])
        scored = replace(batch, loss_positions=batch.weights.flatten().nonzero().flatten())
        sums.append(-nll(params, scored, per_example=True)[0])
    return torch.cat(sums)
