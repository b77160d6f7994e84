"""Steps of GRPO by several processes beside the same by one: prints how far they are apart, and the FLOPs of each.

A draw at the border of two tokens may fall on either, by rounding, and the trainings would go different ways from
there: the one process samples too, and learns from the answers that the others have sampled.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/scripts/shared_rollouts.py
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from gloo_report import gloo_report
from torch.utils.flop_counter import FlopCounterMode

from fgpt.cli.console import console
from fgpt.cli.tasks import build_task
from fgpt.cli.training import rollout_job
from fgpt.cli.training.hashes import fast_hash
from fgpt.distributed import alone, gather_objects
from fgpt.generation.loop import GenerationOutput
from fgpt.objectives.rollouts import Groups, sample_groups
from fgpt.recipes import find
from fgpt.tree import leaves

STEPS = 3


def train(prompts: int, sample: Callable[..., Groups]) -> tuple[Any, list[dict[str, float]]]:
    rollout_job.sample_groups = sample
    recipe = find("grpo-nano")
    options: dict[str, Any] = {"micro_batch_size": 2, "grad_accumulation_steps": 2 * prompts, "num_generations": 4}
    options |= {"max_completion_length": 24, "lr": 1e-3, "warmup_steps": 0, "beta": 0.1, "seed": 1}
    job = build_task(dataclasses.replace(recipe, **options)).job
    state, figures = job.initial_state.take(), []
    for step, micro_batches in zip(range(STEPS), job.batches(0)):
        state, metrics = job.train_step(state, micro_batches, step)
        assert metrics.others is not None
        others = {name: float(x) for name, x in metrics.others.items()}
        figures.append({"loss": float(metrics.loss), "grad_norm": float(metrics.grad_norm), **others})
    return state, figures


def flat(groups: Groups) -> list[GenerationOutput]:
    return [answer for group in groups for answer in group]


def main() -> None:
    console.quiet = True
    with gloo_report() as report:
        for prompts in (4, 1):  # of one prompt, ranks share its answers
            sampled: list[Groups] = []
            others: list[Groups] = []

            def record(*args: Any, to: list[Groups] = sampled, **kwargs: Any) -> Groups:
                to.append(sample_groups(*args, **kwargs))
                return to[-1]

            def replay(*args: Any, to: list[Groups] = others, past: list[Groups] = sampled, **kwargs: Any) -> Groups:
                record(*args, to=to, **kwargs)
                return past[len(to) - 1]

            with FlopCounterMode(display=False) as shared:
                state, figures = train(prompts, record)
            with alone(), FlopCounterMode(display=False) as whole:
                expected_state, expected = train(prompts, replay)
            vectors = [torch.cat([x.flatten() for x in leaves(s.trainable).values()]) for s in (state, expected_state)]
            hashes = gather_objects(fast_hash(state))
            report[str(prompts)] = {
                "ranks": len(set(hashes)),
                "leaves": float((vectors[0] - vectors[1]).norm() / vectors[1].norm()),
                "answers": [[x == y for x, y in zip(flat(a), flat(b), strict=True)] for a, b in zip(sampled, others)],
                "figures": figures,
                "expected": expected,
                "flops": gather_objects(shared.get_total_flops()),
                "alone": whole.get_total_flops(),
            }


if __name__ == "__main__":
    main()
