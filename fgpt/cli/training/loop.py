"""The training loop: steps, metrics and checkpoints, and an interruption that leaves something usable."""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fgpt.cli import processes
from fgpt.cli.console import console
from fgpt.cli.errors import DISK_FULL
from fgpt.cli.metrics_log import HELDOUT_LOSS, Line, loss_label
from fgpt.cli.run_dir import METRICS, resume_command
from fgpt.cli.signals import on_first_signal
from fgpt.cli.training import checkpoints
from fgpt.cli.training.background import in_background
from fgpt.cli.training.checkpoints import Checkpointer, NoCheckpointer
from fgpt.cli.training.early_stopping import is_exhausted
from fgpt.cli.training.heap import keep_freed_memory
from fgpt.cli.training.job import TrainingJob
from fgpt.cli.training.pending import SAMPLED_TOKENS, PendingMetrics
from fgpt.cli.training.reproducibility import rounding
from fgpt.cli.training.step_log import MetricsLog, progress_line
from fgpt.cli.training.trackers import tracking
from fgpt.distributed import any_rank, from_first_rank, object_from_first_rank, sum_over_ranks
from fgpt.errors import InputError
from fgpt.kernels.sharded_parameter import has_sharded_parameters
from fgpt.sharding import gather_on_first, split_from_first, whole_on_meta
from fgpt.train_step import State
from fgpt.tree import device, leaves

AHEAD_DEVICES = frozenset({"cuda"})
"""Where the next step is launched before the metrics of the last one are read. A CPU has computed them by then."""


@dataclass(frozen=True)
class TrainResult:
    """How a training ended."""

    state: State
    """What the run leaves: the state after its last step, or the best one."""
    interrupted: bool
    seconds: float


def train_loop(job: TrainingJob, out: Path) -> TrainResult:
    """Train from the last checkpoint in the run directory `out`, if there is one, else from the initial state.

    A JSON line per step goes to the metrics file. A checkpoint is written every N minutes, at the end, and at each best
    held-out loss. Ctrl-C, SIGTERM and SIGHUP end the training after the current step, with a checkpoint; so does early
    stopping, which is an end and no interruption.

    Of several processes all train, and evaluate; rank 0 alone reads and writes the directory. They end at one step:
    each learns after a step whether another one was interrupted. A state in parts is gathered for each checkpoint, so
    that all learn after a step whether one is due; if a process is lost, so is its part.

    On a GPU a step's metrics are read while it computes the next step, and a thread prepares the batches. A step that
    is followed by a checkpoint or a held-out loss is read before the next one begins: no state is saved whose loss is
    not known to be finite, and none is kept for long.

    Raises InputError if the loss is no longer finite, a trained leaf does not change, or the disk is full.
    """
    state, first = _resume_or_start(job, out), processes.is_first()
    keep_freed_memory()
    begin, target = int(state.step), device(state.trainable)
    in_parts = has_sharded_parameters(state.trainable)
    is_ahead = target.type in AHEAD_DEVICES
    log = MetricsLog(out / METRICS if first else None, begin, rounding(job.recipe, target))
    guard = FrozenLeafGuard(job, state)
    metric, patience = next(iter(job.eval_losses), ""), job.recipe.early_stopping_patience
    keeps_best = job.recipe.keep_best or job.recipe.eval_every != "auto"  # a curve alone costs no checkpoints
    _print_followed_loss(job, metric)
    followed_losses = object_from_first_rank(log.earlier_values(metric, begin))
    checkpointer = Checkpointer(out, job.recipe, job.fingerprint) if first else NoCheckpointer()
    with (
        _disk_errors(out),
        graceful_interrupt() as interrupt_requested,
        tracking(job.recipe, out, begin) if first else contextlib.nullcontext(lambda line: None) as track,
        log,
        progress_line(begin, job.steps) as show,
        (in_background if is_ahead else contextlib.nullcontext)(job.batches(begin)) as batches,
    ):

        def write(line: Line) -> None:
            line = line | job.epochs(line["step"])
            log.write(line)
            track(line)
            show(line)

        unread: PendingMetrics | None = None
        last_step = begin if is_exhausted(patience, followed_losses) else job.steps
        for step, micro_batches in zip(range(begin + 1, last_step + 1), batches):
            lr, previous = float(job.schedule(torch.tensor(step - 1))), state
            try:
                state, metrics = job.train_step(previous, micro_batches, step - 1)
            except RuntimeError as err:
                if processes.is_of_others(err) and unread is None and step - 1 > begin and not in_parts:
                    checkpointer.save_if_later(previous)  # the last step that all have taken
                raise
            tokens = sum(batch.tokens.numel() for batch in micro_batches)
            if metrics.others and SAMPLED_TOKENS in metrics.others:
                tokens += int(metrics.others[SAMPLED_TOKENS])
            pending = PendingMetrics(step, metrics, lr=lr, tokens=tokens)
            if unread is not None:
                write(log.measure(unread, device=target, mfu=job.mfu))
                unread = None
            is_last = any_rank(interrupt_requested()) or step == job.steps
            reads_now = in_parts or step <= 2 or evaluation_is_due(job, step) or checkpointer.is_due(None, is_last)
            if is_ahead and not reads_now:
                unread = pending
                continue
            line = log.measure(pending, device=target, mfu=job.mfu)
            guard.check(previous, state, line)
            del previous  # its memory is free for the next step
            with log.pause():
                losses = _evaluate_if_due(job, state, step)
                followed_loss = losses.get(metric)
                followed_losses += [] if followed_loss is None else [followed_loss]
                if losses:  # they took a while, on all ranks alike
                    is_last = any_rank(interrupt_requested()) or is_last
                is_last = is_last or is_exhausted(patience, followed_losses)
                if job.epsilon is not None and (losses or is_last):
                    line["epsilon"] = job.epsilon(step)
                    console.print(f"step {step}  privacy spent: epsilon {line['epsilon']:.3f}")
                write(line | losses)
                best_loss = followed_loss if keeps_best else None
                is_due = checkpointer.is_due(best_loss, is_last)
                if any_rank(is_due) if in_parts else is_due:
                    whole = gather_on_first(state) if in_parts else state
                    if whole is not None:
                        log.sync()  # the metrics up to a checkpoint are on disk before it
                        checkpointer.save(whole, best_loss)
                    del whole
            if is_last:
                break
    checkpointer.prune()  # for a training that was killed while it pruned after its last step
    stopped_early = int(state.step) < job.steps and is_exhausted(patience, followed_losses)
    if stopped_early:
        console.print(
            f"stopped early, after step {int(state.step)} of {job.steps}: in {patience} evaluations the "
            f"{loss_label(metric)} loss has not fallen below {min(followed_losses):.4f}"
        )
    interrupted = int(state.step) < job.steps and not stopped_early
    if job.recipe.keep_best and not interrupted:
        state = _best_state(job, state, out)
    return TrainResult(state, interrupted, log.seconds)


def _resume_or_start(job: TrainingJob, out: Path) -> State:
    initial = job.initial_state.take()
    state = checkpoints.resume(out, _on_file(initial), job.fingerprint) if processes.is_first() else None
    if object_from_first_rank(state is None):
        return initial
    state = _from_file(state, initial)
    if int(state.step):
        console.print(f"resuming after step {int(state.step)} of {job.steps}")
    return state


def _on_file(state: State) -> State:
    """A state as a checkpoint has it: whole."""
    return whole_on_meta(state) if has_sharded_parameters(state.trainable) else state


def _from_file(read: State | None, like: State) -> State:
    """On every rank what rank 0 has read, in parts as `like` is; None in the others."""
    if has_sharded_parameters(like.trainable):
        return split_from_first(read, like)
    return from_first_rank(like if read is None else read)


class FrozenLeafGuard:
    """Finds trained leaves that do not change in the first two steps: nothing would be trained, in silence.

    A LoRA's A changes from the second step on, since its B begins at 0; every other leaf has changed by then. Steps
    whose rewards are all equal, and that learn no span, do not count: they have no gradient.
    """

    def __init__(self, job: TrainingJob, state: State) -> None:
        self._job = job
        self._unchanged = set(leaves(state.trainable))
        self._last_step = 2

    def check(self, previous: State, state: State, line: Line) -> None:
        """Raises InputError after step 2 if a leaf is as it was at the start. `line` is the step's line of the log."""
        step, lr = line["step"], line["lr"]
        if not self._unchanged or step > self._last_step:
            return
        if line.get("frac_reward_zero_std") == 1 and not line.get("span_ratio"):
            self._last_step = step + 2
            return
        before, after = leaves(previous.trainable), leaves(state.trainable)
        paths = sorted(self._unchanged)
        changed = torch.stack([(before[path] != after[path]).any() for path in paths]).float()
        if has_sharded_parameters(state.trainable):  # another process's part may have
            changed = sum_over_ranks(changed)
        self._unchanged = {path for path, x in zip(paths, changed.tolist(), strict=True) if not x}
        if self._unchanged and step == self._last_step:
            some_paths = ", ".join(sorted(self._unchanged)[:4])
            leave_out = ", or leave them out by --adapter.target" if self._job.frozen is not None else ""
            raise InputError(
                f"{len(self._unchanged)} of {len(after)} trained leaves did not change in two steps ({some_paths}): "
                f"the loss does not depend on them, or lr {lr:.2g} is below their precision; raise --lr{leave_out}"
            )


def _print_followed_loss(job: TrainingJob, metric: str) -> None:
    """Say which of several losses decides, if one does. The held-out loss alone needs no word."""
    follows = job.recipe.keep_best or job.recipe.early_stopping_patience is not None
    if follows and list(job.eval_losses) != [HELDOUT_LOSS]:
        console.print(f"the best state and early stopping follow the {loss_label(metric)} loss", markup=False)


AUTO_EVALUATIONS = 10
"""Evaluations of a training with eval_every auto, if it has twice as many steps or more. A shorter one evaluates after
each step if its result depends on that, else not at all."""


def evaluation_is_due(job: TrainingJob, step: int) -> bool:
    """Whether the recipe evaluates after this step."""
    every = job.recipe.eval_every
    if not job.eval_losses or every is None:
        return False
    if every == "auto":
        if job.steps < 2 * AUTO_EVALUATIONS:
            return job.recipe.keep_best or job.recipe.early_stopping_patience is not None
        return step % math.ceil(job.steps / AUTO_EVALUATIONS) == 0 or step == job.steps
    return step % every == 0


def evaluate(job: TrainingJob, state: State) -> dict[str, float]:
    """The losses of an evaluation by their metrics."""
    params = job.evaluation_params(state)
    return {metric: loss(params) for metric, loss in job.eval_losses.items()}


def _evaluate_if_due(job: TrainingJob, state: State, step: int) -> dict[str, float]:
    """The losses of an evaluation, printed; none if no evaluation is due after this step."""
    if not evaluation_is_due(job, step):
        return {}
    losses = object_from_first_rank(evaluate(job, state))  # of other processors the last digits differ
    figures = ", ".join(f"{loss_label(metric)} loss {loss:.4f}" for metric, loss in losses.items())
    console.print(f"step {step}  {figures}", markup=False)
    return losses


def _best_state(job: TrainingJob, last: State, out: Path) -> State:
    """The state of least held-out loss; the last one if no checkpoint has a held-out loss."""
    best = checkpoints.load_best(out, _on_file(last), job.fingerprint) if processes.is_first() else None
    if object_from_first_rank(best is None):
        console.print("no checkpoint has a held-out loss: keeping the last state")
        return last
    best = _from_file(best, last)
    console.print(f"keeping the state after step {int(best.step)}, of the least held-out loss")
    return best


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Add to errors of writing how the training is resumed."""
    try:
        yield
    except OSError as err:
        remedy = "free space" if err.errno in DISK_FULL else "fix that"
        raise InputError(f"cannot write to {out}: {err.strerror or err}; {remedy}, then {resume_hint(out)}") from None
    except InputError as err:
        if "free space" not in str(err):
            raise
        problem = str(err).removesuffix(" or choose another folder")  # a run is resumed in its own
        raise InputError(f"{problem}, then {resume_hint(out)}") from None


def resume_hint(out: Path) -> str:
    """The command that resumes a training."""
    return f"resume with: {resume_command(out)}"


@contextlib.contextmanager
def graceful_interrupt() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C, SIGTERM or SIGHUP has requested an end. A second one ends the process at once."""
    requested = threading.Event()

    def request(*_: Any) -> None:
        requested.set()
        with contextlib.suppress(RuntimeError):  # a signal in the middle of another line
            console.print("ending after this step; Ctrl-C again to end at once")

    with on_first_signal(request):
        yield requested.is_set
