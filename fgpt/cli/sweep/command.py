"""`fgpt sweep RECIPE --lr 1e-3 3e-3 --seed 0 1 2`: every combination of values, trained together.

runs/lora-nano-sweep/lr-1e-3-seed-0/    the run directory of each member, as if it had been trained alone
sweep.json                              the members, their values, losses and states
report.html                             the same on one page, with curves

Several processes, which torchrun starts, each train groups of members, and write their run directories: group i is of
rank i mod N. They meet where a pruner decides, and rank 0 writes the rest.
"""

import itertools
import math
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from fgpt.cli import processes, run_dir, tasks
from fgpt.cli.console import console, exclusive_progress, quiet, result_console, show_progress
from fgpt.cli.environment import environment
from fgpt.cli.metrics_log import plot_loss
from fgpt.cli.model_card.card import write_trained_card
from fgpt.cli.paths import without_paths
from fgpt.cli.processes import is_first, remedy
from fgpt.cli.run_json import write_run
from fgpt.cli.sweep import loop, results
from fgpt.cli.sweep.grid import Values, member_recipes
from fgpt.cli.sweep.members import Member
from fgpt.cli.sweep.memory import members_that_fit
from fgpt.cli.sweep.page import write_page
from fgpt.cli.sweep.pruners import PrunerName, below_median, halving_losers, halving_rungs, median_rungs
from fgpt.cli.training.final_state import check_final_state
from fgpt.cli.training.hashes import fast_hash
from fgpt.cli.training.heap import keep_freed_memory
from fgpt.cli.training.job import training_options
from fgpt.cli.training.loop import graceful_interrupt
from fgpt.cli.training.shared_models import share_models
from fgpt.cli.training.shared_update import describe_inputs
from fgpt.distributed import World, alone, object_from_first_rank, world
from fgpt.errors import InputError
from fgpt.io.files import write_json
from fgpt.ranges import PositiveInt, Range
from fgpt.recipes import AnyRecipe
from fgpt.train_step import State
from fgpt.tree import device, num_elements


@dataclass(frozen=True)
class SweepOptions:
    """Train every combination of the values of --lr, --seed, --adapter.rank, --adapter.alpha, --weight-decay and
    --warmup-steps as one program over one base. All options of the recipe may be given as well.
    """

    pruner: PrunerName = "none"
    """halving: at each rung the best of --reduction-factor members goes on. median: who was never better than the
    median is stopped. They compare held-out losses, or without held-out rows the smoothed losses."""
    reduction_factor: Annotated[int, Range(least=2, most=1000)] = 2
    """Of halving: one in so many goes on, and each rung has so many times the steps of the one before."""
    min_steps: PositiveInt | None = None
    """Steps before the first member can be stopped; None takes a fifth of the training, of halving so many that one
    member is left after a quarter."""
    group_size: PositiveInt | None = None
    """Members that are trained at once; None measures how many fit into memory."""


def run(name: str, args: Sequence[str], options: SweepOptions, command: str) -> Path:
    """Begin a sweep. Returns its folder. Raises InputError for bad input, before anything is written."""
    recipes = member_recipes(name, args, command)
    first = recipes[0][1]
    folder_name = _name_of(args, f"{name}-sweep")
    run_dir.check_name(folder_name)
    check_budget(options, len(recipes))
    check_writable(first.out)
    members = build_members(recipes, first.out / folder_name)
    _check_alike(members, str(options))
    folder = Path(object_from_first_rank(str(run_dir.new_folder(first.out, folder_name)) if is_first() else ""))
    for member in members:
        member.folder = folder / member.name
    header = {
        "recipe": name,
        "command": without_paths(shlex.join([*shlex.split(command), *_with_options(args, options)])),
        "pruner": options.pruner,
        "reduction_factor": options.reduction_factor,
        "min_steps": options.min_steps,
        "group_size": options.group_size,
        "groups": {},
        "rungs": {},
    }
    with ExitStack() as locks:
        if is_first():
            for member in members:
                member.folder.mkdir()
            locks.enter_context(lock(folder, [member.folder for member in members]))
            machine = environment()
            for member in members:
                write_json(member.folder / run_dir.ENVIRONMENT, machine)
                write_run(member.folder, replace(member.task.recipe, out=folder))
                member.set_state("waiting")
            results.write_results(folder, header, members)
        _wait_for_first(folder)
        return train(folder, header, members)


def resume(folder: Path) -> Path:
    """Go on with a sweep. Returns its folder. Raises InputError if it is none, or has ended."""
    header = results.read_results(folder)
    entries = header.pop("members")
    if all(entry["state"] in ("finished", "stopped", "failed") for entry in entries):
        raise InputError(f"nothing to resume: the members of {folder} have ended; its results are in {results.SWEEP}")
    with ExitStack() as locks:
        if is_first():
            locks.enter_context(lock(folder, [folder / entry["name"] for entry in entries]))
            for entry in entries:
                run_dir.remove_leftovers_of_run(folder / entry["name"])
        _wait_for_first(folder)
        recipes = [(entry["values"], run_dir.read_run(folder / entry["name"])) for entry in entries]
        members = build_members(recipes, folder)
        _check_alike(members, f"{header} {entries}")
        for member, entry in zip(members, entries, strict=True):
            member.read_lines()
            member.state, member.why = entry["state"], entry["why"]
            if entry["heldout_loss"] is not None and not member.is_active:
                member.heldout_losses.setdefault(entry["steps"], entry["heldout_loss"])
        return train(folder, header, members)


def _check_alike(members: Sequence[Member], sweep: str) -> None:
    """Raises InputError unless all processes train the same members by the same code."""

    def describe() -> dict[str, str]:
        recipes = [training_options(member.job.recipe) for member in members]
        hashes = {"members": fast_hash(recipes), "options of the sweep": fast_hash(sweep)}
        return describe_inputs(members[0].job, None) | hashes

    processes.check_alike(describe)


def _wait_for_first(folder: Path) -> None:
    """Wait until rank 0 has prepared the folder of a sweep. Raises InputError if another one does not see it."""
    object_from_first_rank(None)
    if not (folder / run_dir.SWEEP).is_file():
        raise InputError(f"{folder} is not here: processes on several machines need one file system for --out FOLDER")


def check_budget(options: SweepOptions, members: int) -> None:
    """Raises InputError for options of a pruner that is not chosen."""
    if options.pruner == "none" and (options.min_steps or options.reduction_factor != SweepOptions.reduction_factor):
        raise InputError("--min-steps and --reduction-factor are of --pruner halving or median: give one of them")
    if options.pruner == "median" and options.reduction_factor != SweepOptions.reduction_factor:
        raise InputError("--reduction-factor is of --pruner halving: leave it out")
    if options.pruner == "median" and members < 3:
        raise InputError(f"--pruner median needs 3 members or more, to compare with others: there are {members}")


def check_writable(out: Path) -> None:
    """Raises InputError if no folder can be made there, before anything slow begins."""
    existing = next((at for at in (out, *out.absolute().parents) if at.exists()), out)
    try:
        Path(tempfile.mkdtemp(dir=existing)).rmdir()
    except OSError as err:
        reason = err.strerror or err
        raise InputError(
            f"cannot make folders in {existing}: {reason}; choose another place with --out FOLDER"
        ) from None


def build_members(recipes: Sequence[tuple[Values, AnyRecipe]], folder: Path) -> list[Member]:
    """The members with their data and initial states over one base in memory. The first one prints what it is.

    Raises InputError as the building of a task does.
    """
    members: list[Member] = []
    with alone(), share_models(), show_progress("building members", len(recipes)) as advance:
        for values, recipe in recipes:
            with quiet() if members else ExitStack():
                task = tasks.build_task(recipe)
            members.append(Member(values, task, folder / recipe.name, task.job.initial_state.peek()))
            advance(1)
    return members


def train(folder: Path, header: dict[str, Any], members: list[Member]) -> Path:
    """Train the members that are left, print and write the results.

    Raises KeyboardInterrupt after saving checkpoints, if an end was requested; and InputError if no member is left.
    """
    here, begin = world(), time.monotonic()
    with graceful_interrupt() as requested, remedy(f"resume with: {_resume_command(folder)}"), alone():

        def interrupt_requested() -> bool:
            return processes.is_interrupted(requested())

        trainer = loop.Trainer(members, interrupt_requested, _progress(members, here))
        if header["group_size"] is None and "fitting" not in header:
            fitting = processes.gather(_fitting(members, trainer), requested)
            header["fitting"] = min(size for size in fitting if size is not None)
        console.print(f"{header['recipe']}: {_describe_groups(header, members, here)}")
        keep_freed_memory()
        try:
            with exclusive_progress("sweep"):
                _train_to_the_end(folder, header, members, trainer, here, requested)
        except KeyboardInterrupt:
            if is_first():
                for member in members:
                    if member.is_active:
                        member.set_state("waiting")
                results.write_results(folder, header, members)
            console.print(f"interrupted; resume with: {_resume_command(folder)}", soft_wrap=True)
            raise
    if processes.leave():
        _report(folder, header, members, time.monotonic() - begin)
    return folder


def _resume_command(folder: Path) -> str:
    return f"fgpt sweep {shlex.quote(str(folder))} --resume"


def _group_size(header: Mapping[str, Any], active: int, here: World) -> int:
    """How many of the active members are trained at once: what was asked for, or what fits, less if processes would
    have none.
    """
    if header["group_size"] is not None:
        return header["group_size"]
    return max(1, min(header["fitting"], math.ceil(active / here.size)))


def _describe_groups(header: Mapping[str, Any], members: Sequence[Member], here: World) -> str:
    size = min(_group_size(header, len(members), here), len(members))
    counts = sorted({member.job.steps for member in members})
    steps = f"{counts[0]} steps each" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} steps"
    which = "" if here.size == 1 else f" in each of {here.size} processes"
    return f"{len(members)} members, {size} at once{which}, {steps}"


def _train_to_the_end(
    folder: Path,
    header: dict[str, Any],
    members: list[Member],
    trainer: loop.Trainer,
    here: World,
    requested: Callable[[], bool],
) -> None:
    steps = max(member.job.steps for member in members)
    rungs: list[int] = []
    if header["pruner"] == "halving":
        rungs = halving_rungs(len(members), steps, header["reduction_factor"], header["min_steps"])
    elif header["pruner"] == "median":
        rungs = median_rungs(steps, header["min_steps"])
    by_name = {member.name: member for member in members}

    def write_results() -> None:
        if is_first():
            results.write_results(folder, header, members)

    for rung in [*rungs, steps]:
        if str(rung) in header["rungs"]:
            continue  # decided before an interruption
        if header["groups"].get("rung") != rung:  # an interrupted sweep goes on with the groups that it had
            names = [member.name for member in members if member.is_active]
            size = _group_size(header, len(names), here)
            header["groups"] = {"rung": rung, "names": [names[i : i + size] for i in range(0, len(names), size)]}
            write_results()
        groups = [[by_name[name] for name in names] for names in here.share(header["groups"]["names"])]
        trained_here, is_interrupted = [member for group in groups for member in group], False
        try:
            for group in groups:
                _train_group(group, rung, trainer)
                write_results()
            if rung != steps:
                _measure(trained_here, rung)
        except KeyboardInterrupt:
            is_interrupted = True
        _meet(members, trained_here, is_interrupted, requested)
        if rung != steps:
            _prune(header, members, trained_here, rung)
        write_results()


def _meet(
    members: Sequence[Member], trained_here: Sequence[Member], is_interrupted: bool, requested: Callable[[], bool]
) -> None:
    """Wait for the other processes, and learn how their members stand.

    Raises KeyboardInterrupt if one of them was interrupted.
    """
    standings = {member.name: member.standing() for member in trained_here}
    meeting = processes.gather({"is_interrupted": is_interrupted, "standings": standings}, requested)
    others = {name: x for there in meeting if there is not None for name, x in there["standings"].items()}
    for member in members:
        if member.name in others and member not in trained_here:
            member.follow(others[member.name])
    if any(there is None or there["is_interrupted"] for there in meeting):
        raise KeyboardInterrupt


def _train_group(group: list[Member], rung: int, trainer: loop.Trainer) -> None:
    """Train the active members of a group to a rung, if they have not reached it, and finish those at their end."""
    latest = {member: member.checkpoint() for member in group if member.is_active}
    going_on = {member: state for member, state in latest.items() if int(state.step) < member.job.steps}
    if going_on:
        states = loop.common_start(going_on)
        if int(states[0].step) < rung:
            trainer.train(list(going_on), states, rung)
    for member in latest:
        if member.is_active and (member not in going_on or member.step == member.job.steps):
            _finish(member)


def _measure(members: Sequence[Member], rung: int) -> None:
    """Measure the held-out losses by which a pruner decides."""
    for member in members:
        if member.is_active:
            loop.measure_heldout(member, member.checkpoint(rung))


def _prune(header: dict[str, Any], members: Sequence[Member], trained_here: Sequence[Member], rung: int) -> None:
    """Stop the members that the pruner does not let go on after a rung. Each process saves those it has trained."""
    active = [member for member in members if member.is_active]
    losses = {member.name: member.score for member in active}
    header["rungs"][str(rung)] = losses
    if header["pruner"] == "halving":
        stopped = halving_losers(losses, header["reduction_factor"])
    else:
        past = [scores for step, scores in header["rungs"].items() if int(step) <= rung]
        earlier = {name: [scores[name] for scores in past if name in scores] for name in losses}
        stopped = below_median(losses, earlier)
    for member in active:
        if member.name not in stopped:
            member.state = "waiting"
            continue
        why = f"loss {losses[member.name]:.4f} after step {rung}, by {header['pruner']}"
        if member in trained_here:
            _save(member, member.checkpoint(rung))
            member.set_state("stopped", why)
        else:
            member.state, member.why = "stopped", why


def _finish(member: Member) -> None:
    """Check, measure and save a member that has taken all its steps; one that is not finite has failed."""
    state = member.checkpoint()
    try:
        check_final_state(member.job, state, member.name)
    except InputError as err:
        member.set_state("failed", str(err))
        console.print(f"{member.name}: {err}", soft_wrap=True)
        return
    loop.measure_heldout(member, state)
    _save(member, state)
    member.set_state("finished")


def _save(member: Member, state: State) -> None:
    """Save what was trained as a training by itself does."""
    with quiet():
        member.task.save(member.job.evaluation_params(state), member.folder)
    _write_card(member)
    unit = tasks.task_type(member.task.recipe).loss_unit
    plot_loss(member.folder / run_dir.METRICS, member.folder / run_dir.LOSS, member.name, unit)


def _write_card(member: Member) -> None:
    recipe = member.task.recipe
    write_trained_card(member.folder, recipe, tasks.task_type(recipe).class_names(recipe))


def _report(folder: Path, header: dict[str, Any], members: list[Member], seconds: float) -> None:
    """Print and write the results; the winner is scored as a training by itself is.

    Raises InputError if no member has finished.
    """
    results.write_results(folder, header, members)
    result_console.print(results.table(members, f"{header['recipe']}: the best first"))
    if spreads := results.over_seeds(members):
        result_console.print(results.spread_table(spreads))
    counts = {s: sum(member.state == s for member in members) for s in ("finished", "stopped", "failed")}
    how = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    summary = f"{len(members)} members of {header['recipe']}: {how}; {seconds:.0f} s"
    path = write_page(folder, folder.name, summary, members, header["command"])
    console.print(f"{summary}; written: {path}", soft_wrap=True)
    best = results.winner(members)
    if best is None:
        raise InputError(f"no member of {folder} has finished: the losses became infinite; lower --lr")
    task = best.task
    before = task.score_initial()
    state = best.checkpoint()
    task.report(before, task.score(best.job.evaluation_params(state), best.folder), best.folder)
    _write_card(best)  # with the scores
    console.print(f"the best is {best.name}; {task.recipe.suggest_use(best.folder)}", soft_wrap=True)


def _fitting(members: Sequence[Member], trainer: loop.Trainer) -> int:
    largest = sorted(members, key=lambda member: -num_elements(member.initial.trainable))

    def take_step(count: int) -> None:
        group = largest[:count]
        trainer.take_step(group, trainer.stack([member.initial for member in group]), 0)

    return members_that_fit(len(members), take_step, device(members[0].initial.trainable))


def _progress(members: Sequence[Member], here: World) -> Any:
    """Prints a table of the members some twenty times in a sweep."""
    total = sum(member.job.steps for member in members)
    printed = [0.0, time.monotonic()]

    def show() -> None:
        done, now = sum(member.step for member in members), time.monotonic()
        if done - printed[0] < total / 20 and now - printed[1] < 120:
            return
        if now - printed[1] < 5 and done < total:
            return
        printed[:] = [float(done), now]
        for member in members if here.size > 1 else ():
            if member.state != "training":
                member.read_lines()  # that others train
        result_console.print(results.table(members, f"step {max(m.step for m in members)}", limit=8))

    return show


@contextmanager
def lock(folder: Path, members: Sequence[Path]) -> Iterator[None]:
    """Keeps other processes from training in the sweep or in one of its members. Raises InputError if one does."""
    with ExitStack() as locks:
        for at in (folder, *members):
            if not at.is_dir():
                raise InputError(f"{at} is missing: it is a member of this sweep; restore it, or begin a new sweep")
            locks.enter_context(run_dir.lock_folder(at))
        yield


def _name_of(args: Sequence[str], default: str) -> str:
    """The last value of --name: of the sweep's folder, for members have names of their own."""
    name = default
    for option, value in itertools.pairwise([*args, ""]):
        if option == "--name" or option.startswith("--name="):
            name = option.removeprefix("--name=") if "=" in option else value
    return name


def _with_options(args: Sequence[str], options: SweepOptions) -> list[str]:
    """The arguments of a sweep, its own options that are not defaults included."""
    changed = [(name, value) for name, value in vars(options).items() if value != getattr(SweepOptions, name)]
    return [*args, *(part for name, value in changed for part in (f"--{name.replace('_', '-')}", str(value)))]
