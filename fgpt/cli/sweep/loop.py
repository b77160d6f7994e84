"""The loop of a sweep: groups of members, each trained as one stack from rung to rung."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fgpt.cli.console import console
from fgpt.cli.devices import peak_memory
from fgpt.cli.metrics_log import HELDOUT_LOSS, Line
from fgpt.cli.sweep.members import Member
from fgpt.cli.training.job import place
from fgpt.cli.training.loop import evaluate, evaluation_is_due
from fgpt.cli.training.optimizers import make_optimizer
from fgpt.optim import Optimizer
from fgpt.rng import fold_in
from fgpt.sweeps import (
    SweepStep,
    member_seeds,
    stack_batches,
    stack_states,
    sweep_step,
    take_members,
    unstack_states,
)
from fgpt.train_step import Metrics, State
from fgpt.tree import device


class Trainer:
    """Takes the steps of members that are stacked. All of them train by the first one's program.

    Args:
        members: All members of the sweep.
        interrupt_requested: Whether to end after the step.
        show: Is called after each step.
    """

    def __init__(
        self, members: Sequence[Member], interrupt_requested: Callable[[], bool], show: Callable[[], None]
    ) -> None:
        first = members[0].job
        assert first.step_for is not None
        step_for: Any = first.step_for
        self._frozen, self._interrupt_requested, self._show = first.frozen, interrupt_requested, show
        self._optimizer: Optimizer = make_optimizer(first.recipe, lambda step: torch.tensor(0.0))  # pyright: ignore
        self._step: SweepStep = sweep_step(lambda h: step_for(lambda _: h["lr"], h["weight_decay"]))
        self._target = device(members[0].initial.trainable)
        self._saved_at = time.perf_counter()

    def stack(self, states: Sequence[State]) -> State:
        return stack_states(states, self._optimizer)

    def take_step(self, group: Sequence[Member], stacked: State, step: int) -> tuple[State, Metrics, list[Line]]:
        """The states after the step that follows `step` steps, its metrics, and the rate and tokens of each member."""
        micro_batches = [member.next_batches(step) for member in group]
        tokens = [sum(batch.tokens.numel() for batch in batches) for batches in micro_batches]
        batches = [place(batch, self._target) for batch in stack_batches(micro_batches)]
        keys = [fold_in(member.job.rng, step) for member in group]
        seeds = member_seeds(keys, len(batches), self._target)
        lrs = [float(member.job.schedule(torch.tensor(step))) for member in group]
        decays = [float(member.job.recipe.weight_decay) for member in group]  # pyright: ignore[reportAttributeAccessIssue]
        hyperparameters = {
            "lr": torch.tensor(lrs, dtype=torch.float64, device=self._target),
            "weight_decay": torch.tensor(decays, device=self._target),
        }
        stacked, metrics = self._step(stacked, self._frozen, batches, seeds, hyperparameters)
        return stacked, metrics, [{"lr": lr, "tokens": count} for lr, count in zip(lrs, tokens, strict=True)]

    def train(self, group: list[Member], states: Sequence[State], end: int) -> None:
        """Train the members from one step, that of their states, to step `end` or their own last one. Afterwards each
        has a checkpoint. A member whose loss is not finite fails with the state before, and the others go on.

        Raises KeyboardInterrupt after saving checkpoints, if an end was requested.
        """
        group, begin = list(group), int(states[0].step)
        forms = dict(zip(group, states, strict=True))
        stacked = self.stack(states)
        for member in group:
            member.set_state("training")
        for step in range(begin, end):
            start, before = time.perf_counter(), stacked
            stacked, metrics, inputs = self.take_step(group, stacked, step)
            lines = self._lines(group, metrics, inputs, step, time.perf_counter() - start)
            broken = [i for i, line in enumerate(lines) if not math.isfinite(line["loss"] + line["grad_norm"])]
            for i in broken:
                (state,) = unstack_states(take_members(before, [i]), [forms[group[i]]])
                self._fail(group[i], state, lines[i])
            for i, member in enumerate(group):
                if i not in broken:
                    heldout = self._heldout(member, stacked, i, step + 1)
                    member.write([lines[i] | heldout | member.job.epochs(step + 1)])
            done = [i for i, member in enumerate(group) if i not in broken and step + 1 == member.job.steps]
            left = [i for i in range(len(group)) if i not in broken and i not in done]
            if len(left) < len(group):  # no resumed sweep takes a step of another stack again
                self._save(group, stacked, forms, [*done, *left])
                group, stacked = [group[i] for i in left], take_members(stacked, left)
            self._show()
            is_interrupted = self._interrupt_requested()
            is_last = is_interrupted or step + 1 == end
            if group and (is_last or self._is_due(group)):
                self._save(group, stacked, forms, range(len(group)))
                self._saved_at = time.perf_counter()
            if is_interrupted:
                raise KeyboardInterrupt
            if not group:
                return

    def _is_due(self, group: Sequence[Member]) -> bool:
        return time.perf_counter() - self._saved_at >= 60 * group[0].job.recipe.checkpoint_every_minutes

    def _save(self, group: Sequence[Member], stacked: State, forms: dict[Member, State], which: Sequence[int]) -> None:
        """Write checkpoints of some members."""
        if not which:
            return
        chosen = [group[i] for i in which]
        states = unstack_states(take_members(stacked, list(which)), [forms[member] for member in chosen])
        for member, state in zip(chosen, states, strict=True):
            member.save_checkpoint(state)

    def _fail(self, member: Member, state: State, line: Line) -> None:
        why = f"the loss became {line['loss']} (gradient norm {line['grad_norm']}) at step {line['step']}"
        member.save_checkpoint(state)
        member.set_state("failed", why)
        console.print(f"{member.name} is stopped: {why}", soft_wrap=True)

    def _heldout(self, member: Member, stacked: State, i: int, step: int) -> dict[str, float]:
        """The losses of an evaluation by their metrics, if one is due."""
        if not evaluation_is_due(member.job, step):
            return {}
        (state,) = unstack_states(take_members(stacked, [i]), [member.initial])
        losses = evaluate(member.job, state)
        if HELDOUT_LOSS in losses:
            member.heldout_losses[step] = losses[HELDOUT_LOSS]
        return losses

    def _lines(
        self, group: Sequence[Member], metrics: Metrics, inputs: Sequence[Line], step: int, seconds: float
    ) -> list[Line]:
        """The lines of a step for the metrics files. Each member has its share of the time."""
        columns = [x.detach().double().cpu().tolist() for x in (metrics.loss, metrics.grad_norm, metrics.weight)]
        memory = round(peak_memory(self._target) / 1e9, 3)
        lines: list[Line] = []
        for member, read, loss, norm, weight in zip(group, inputs, *columns, strict=True):
            last = member.lines[-1] if member.lines else {}
            lines.append(
                {
                    "step": step + 1,
                    "loss": loss,
                    "grad_norm": norm,
                    "lr": read["lr"],
                    "weight": weight,
                    "tokens": last.get("tokens", 0) + read["tokens"],
                    "seconds": round(last.get("seconds", 0.0) + seconds / len(group), 3),
                    "memory_gb": memory,
                }
            )
        return lines


def measure_heldout(member: Member, state: State) -> None:
    """The held-out loss after the state's step, if rows are held out."""
    loss = member.job.eval_losses.get(HELDOUT_LOSS)
    step = int(state.step)
    if loss is not None and step not in member.heldout_losses:
        member.heldout_losses[step] = loss(member.job.evaluation_params(state))


def common_start(latest: Mapping[Member, State]) -> list[State]:
    """The states of members at one step, the last that all of them have a checkpoint of, from their latest ones. What
    they have of later steps is dropped.
    """
    members, states = list(latest), list(latest.values())
    while len({int(state.step) for state in states}) > 1:
        least = min(int(state.step) for state in states)
        states = [
            state if int(state.step) == least else member.checkpoint(least)
            for member, state in zip(members, states, strict=True)
        ]
    for member, state in zip(members, states, strict=True):
        member.rewind(int(state.step))
    return states
