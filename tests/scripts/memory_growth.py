"""Run by test_memory_growth.py in a process of its own: the checks of shapes that the tests add keep memory.

Prints by how many bytes the process grows over a thousand times, after as many in which allocator and caches rest.
"""

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

import fgpt
from fgpt.adapters import adapt
from fgpt.cli.training.job import InitialState, TrainingJob
from fgpt.cli.training.loop import train_loop
from fgpt.losses import Batch, nll
from fgpt.optim import adamw, constant_schedule
from fgpt.recipes import find
from fgpt.train_step import init_state, make_step

WARM, TIMES = 1000, 1000


def resident() -> int:
    """Bytes of the process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def params() -> fgpt.GPT:
    return fgpt.init(fgpt.Config(1, 2, 16, 40, 31, 32), fgpt.key(0))


def steps(leak: bool = False) -> int:
    """A training with its log, its TensorBoard events and many checkpoints; or one that keeps 10 kB each step."""
    base, leaked, sizes = params(), [], []
    adapters, optimizer = fgpt.lora(base, fgpt.key(2), 2), adamw(1e-3)

    def batches(begin: int) -> Iterator[list[Batch]]:
        for number in range(begin, WARM + TIMES + 1):
            if number in (WARM, WARM + TIMES):
                sizes.append(resident())
            if leak:
                leaked.append(torch.ones(2500))
            x = torch.randint(31, (8, 17), generator=fgpt.rng.fold_in(fgpt.key(1), number))
            yield [Batch(x[:, :-1], x[:, 1:], torch.ones(8, 16))]

    job = TrainingJob(
        recipe=replace(find("lora-nano"), checkpoint_every_minutes=0.001),
        step=make_step(lambda a, frozen, batch, seed: nll(adapt(frozen, a), batch), optimizer),
        frozen=base,
        batches=batches,
        steps=WARM + TIMES + 1,
        schedule=constant_schedule(1e-3),
        rng=fgpt.key(3),
        fingerprint={},
        initial_state=InitialState(init_state(adapters, optimizer)),
        tokenizer=fgpt.tokenizer("nano"),
    )
    with tempfile.TemporaryDirectory() as out:
        train_loop(job, Path(out))
    return sizes[1] - sizes[0]


def texts() -> int:
    """Generations, every second one with an adapter for each row."""
    base, sizes = params(), []
    adapters = [fgpt.lora(base, fgpt.key(i), 2) for i in range(2)]
    warm = fgpt.SamplingParams(temperature=1.0, top_k=5)
    for number in range(WARM + TIMES + 1):
        if number in (WARM, WARM + TIMES):
            sizes.append(resident())
        fgpt.generate(
            base,
            [[1, 2], [4]],
            eos_token_id=0,
            max_new_tokens=2,
            sampling=warm,
            rng=fgpt.key(number),
            adapters=adapters if number % 2 else None,
        )
    return sizes[1] - sizes[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print({"steps": steps, "leak": lambda: steps(leak=True), "texts": texts}[sys.argv[1]]())
