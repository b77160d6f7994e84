"""The processes that torchrun starts for one command: they begin together, agree, and end together.

    torchrun --nproc-per-node 4 -m fgpt train lora-medium

All run the same program. Rank 0 alone prints and writes. What ends one of them ends all: before they end each posts its
error in torchrun's store, and the first rank of those that did says what happened, once.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

from fgpt.cli.console import answers, console, result_console
from fgpt.cli.errors import explain
from fgpt.errors import InputError, one_line

COMMANDS = ("train", "eval", "sweep")
"""What several processes can do together."""
TIMEOUT = "FGPT_TIMEOUT"
"""The environment variable of how many seconds a process waits for the others before it gives up."""
DEFAULT_TIMEOUT = 1800.0
WAITED = "waited"
ROLL_CALL = 5.0
"""Seconds that a process which ends by an error waits for the errors of others."""
FAREWELL = 25.0
"""Seconds that the others wait for rank 0 to end, if all were interrupted: torchrun kills it once one of them ends."""


class AllEndedError(Exception):
    """All processes end, by an error that one of them has printed."""


class NoAnswerError(RuntimeError):
    """Another process has not said in time what it was asked."""


class _Processes(NamedTuple):
    rank: int
    size: int
    store: Any


_processes: list[_Processes] = []
"""Those of this command: one entry, or none for a process by itself."""


def count() -> int:
    """How many processes torchrun has started."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal() or size == "0":
        raise InputError(f"WORLD_SIZE is {size!r}: expected the number of processes, as torchrun sets it, or none")
    return int(size)


def is_first() -> bool:
    """Whether this process prints and writes."""
    return not _processes or _processes[0].rank == 0


@contextlib.contextmanager
def join(command: str) -> Iterator[None]:
    """Within it the processes of torchrun are torch.distributed's default group. A process by itself has none.

    Raises InputError for a command that one process runs, and if the processes cannot meet. Of an error in one process
    all raise AllEndedError after one of them has printed it.
    """
    if count() == 1:
        yield
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of lost connections have stack traces
    if int(os.environ.get("RANK", "0")):
        console.quiet = result_console.quiet = answers.quiet = True
    if command not in COMMANDS:
        raise InputError(
            f"fgpt {command} runs in one process, and torchrun has started {count()}: start it without torchrun"
        )
    _meet()
    try:
        yield
    except Exception as err:
        if (line := explain(err)) is not None:
            _end_by(line, is_lost=False)
        if is_of_others(err):
            _end_by(_describe_loss(err), is_lost=True)
        _post(f"{type(err).__name__}: {one_line(err)}")
        raise
    except KeyboardInterrupt:
        rank, size, store = _processes[0]
        if rank == 0:
            _post_key(store, "first ended")
        _wait_for(store, ["first ended"], FAREWELL)
        _part(store, rank, size)
        raise
    finally:
        leave()
        _processes.clear()


def leave() -> bool:
    """End the group, so that rank 0 goes on by itself. Returns whether this process goes on."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    if _processes and is_first():
        _processes[0] = _processes[0]._replace(size=1)  # it waits for nobody any more
    return is_first()


def timeout_seconds() -> float:
    """How long a process waits for the others. Raises InputError for a value that is no number."""
    text = os.environ.get(TIMEOUT, str(DEFAULT_TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise InputError(f"{TIMEOUT} is {text!r}: expected a number of seconds, such as {DEFAULT_TIMEOUT:g}")
    return seconds


def _meet() -> None:
    """Make the default group: gloo for what is on CPUs, nccl for what is on GPUs."""
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    import fgpt.distributed  # noqa: F401  before there is a group: it says why

    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {count()}, and {', '.join(missing)} is not set: start the processes with torchrun"
        )
    backend = "gloo"
    if torch.cuda.is_available():
        local, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= devices:
            raise InputError(
                f"process {local + 1} of this machine has no GPU, of which there are {devices}: start "
                f"--nproc-per-node {devices}, or hide the GPUs by CUDA_VISIBLE_DEVICES="
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=timeout_seconds())
    try:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store outlives the processes
        store = PrefixStore(f"fgpt/{attempt}", store)
        store.set_timeout(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except dist.DistError as err:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(err):
            raise InputError(f"the port of {where} is in use: give another, torchrun --master-port N") from None
        raise InputError(
            f"the {count()} processes did not meet at {where} within {timeout.total_seconds():g} s ({one_line(err)}): "
            "start all of them, and let them reach that address"
        ) from None
    _processes[:] = [_Processes(rank, size, store)]


# -------------------------------------------------------------------------------------------------------- agreement


def check_alike(describe: Callable[[], Mapping[str, str]]) -> None:
    """Raises InputError unless all ranks give the same values. It names the first that differ.

    Args:
        describe: What must be equal, by its name. A process by itself does not call it.
    """
    if not _processes:
        return
    rank, size, store = _processes[0]
    store.set(f"alike/{rank}", json.dumps(describe()))
    if not _wait_for(store, [f"alike/{other}" for other in range(size)], timeout_seconds()):
        raise NoAnswerError("the others have not said what they train")
    first = json.loads(store.get("alike/0"))
    for other in range(1, size):
        there = json.loads(store.get(f"alike/{other}"))
        differing = [name for name in dict.fromkeys([*first, *there]) if first.get(name) != there.get(name)]
        if not differing:
            continue
        values = [f"{name}: {there.get(name)}, not {first.get(name)}" for name in differing if _is_short(first, name)]
        details = f" ({'; '.join(values)})" if values else ""
        raise InputError(
            f"rank {other} differs from rank 0 in {', '.join(differing)}{details}: give all processes the same"
        )


def _is_short(description: Mapping[str, str], name: str) -> bool:
    """Whether a value says something, as a version does, and a hash or a list of options does not."""
    return len(description.get(name, "")) <= 20


# ------------------------------------------------------------------------------------------- each at work of its own


def is_interrupted(here: bool) -> bool:
    """Whether an end was requested of any process, of this one `here`. Processes that compute apart ask it between
    their steps, by which the others know that they go on.
    """
    if not _processes:
        return here
    rank, _, store = _processes[0]
    _post_key(store, f"pulse/{rank}", str(time.time_ns()))
    if here:
        _post_key(store, "interrupted")
    try:
        return here or store.check(["interrupted"])
    except Exception:  # the store ends with its process
        return True


def gather(value: Any, interrupt_requested: Callable[[], bool]) -> list[Any]:
    """What each process gives, in the order of the ranks; of one that has not come when all are interrupted it is None.
    It waits for hours if need be, as long as those that have not come go on: see `is_interrupted`.

    Args:
        value: What JSON takes.
        interrupt_requested: Whether an end is requested of this process.
    """
    import torch.distributed as dist

    if not _processes:
        return [value]
    rank, size, store = _processes[0]
    number = store.add(f"gatherings of {rank}", 1)
    keys = [f"gathering/{number}/{other}" for other in range(size)]
    store.set(keys[rank], json.dumps(value))
    pulses: list[bytes] = []
    until, is_ending = time.monotonic() + timeout_seconds(), False
    while absent := [other for other in range(size) if not store.check([keys[other]])]:
        if any(_end_of(store, other) for other in absent):
            raise dist.DistError("another process has ended")
        before, pulses = pulses, [_read_key(store, f"pulse/{other}") for other in absent]
        if is_interrupted(interrupt_requested()):
            until, is_ending = time.monotonic() + FAREWELL if not is_ending else until, True
        elif pulses != before:
            until = time.monotonic() + timeout_seconds()
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    if absent and not is_ending:
        raise NoAnswerError("the others have not come")
    return [None if other in absent else json.loads(store.get(keys[other])) for other in range(size)]


def _read_key(store: Any, key: str) -> bytes:
    return store.get(key) if store.check([key]) else b""


# ----------------------------------------------------------------------------------------------------------- the end


def is_of_others(err: Exception) -> bool:
    """Whether an error is one of torch.distributed: other processes do not answer."""
    import torch.distributed as dist

    return isinstance(err, dist.DistError | NoAnswerError) or (isinstance(err, RuntimeError) and "gloo" in str(err))


def _describe_loss(err: Exception) -> str:
    text = one_line(err).lower()
    is_timeout = "timed out" in text or "timeout" in text or isinstance(err, NoAnswerError)
    return f"{WAITED} {timeout_seconds():g} s" if is_timeout else "lost the connection to another process"


def _post(line: str, is_lost: bool = False) -> None:
    rank, _, store = _processes[0]
    _post_key(store, f"end/{rank}", json.dumps({"line": line, "is_lost": is_lost}))


def _post_key(store: Any, key: str, value: str = "") -> None:
    with contextlib.suppress(Exception):  # the store ends with its process
        store.set(key, value)


def _wait_for(store: Any, keys: list[str], seconds: float) -> bool:
    """Wait until all keys are in the store. Returns whether they are there: not if another rank ends by an error. A
    signal ends it, as it would not end a wait of the store's own.
    """
    rank, size, _ = _processes[0]
    until, others = time.monotonic() + seconds, [other for other in range(size) if other != rank]
    try:
        while not store.check(keys):
            if time.monotonic() > until or any(_end_of(store, other) for other in others):
                return False
            time.sleep(0.05)
    except Exception:
        return False
    return True


def _end_by(line: str, *, is_lost: bool) -> NoReturn:
    """Post the error, wait for those of the others, and print what happened if this is the first rank that ends.

    Raises AllEndedError.
    """
    rank, size, store = _processes[0]
    _post(line, is_lost)
    ends = {rank: {"line": line, "is_lost": is_lost}}
    until = time.monotonic() + ROLL_CALL
    while len(ends) < size and time.monotonic() < until:
        time.sleep(0.05)
        ends |= {other: end for other in range(size) if other not in ends and (end := _end_of(store, other))}
    if not _is_reachable(store):  # under torchrun it is not in a rank
        if int(os.environ.get("LOCAL_RANK", rank - 1)) == 0:
            print(f"error: rank 0, or its machine, was lost: {_remedy()}", file=sys.stderr, flush=True)
        raise AllEndedError
    if rank == min(ends) and _is_first_to_speak(store):
        print(f"error: {_describe_ends(ends, size)}", file=sys.stderr, flush=True)
        _post_key(store, "said")
    while not store.check(["said"]) and time.monotonic() < until + ROLL_CALL:  # torchrun ends all once one has ended
        time.sleep(0.02)
    _part(store, rank, len(ends))
    raise AllEndedError


def _part(store: Any, rank: int, size: int) -> None:
    """Rank 0 ends last: without torchrun it holds the store."""
    until = time.monotonic() + ROLL_CALL
    with contextlib.suppress(Exception):
        parted = store.add("parted", int(rank > 0))
        while rank == 0 and parted < size - 1 and time.monotonic() < until:
            time.sleep(0.02)
            parted = store.add("parted", 0)


def _end_of(store: Any, rank: int) -> dict[str, Any] | None:
    """What a rank has posted."""
    try:
        return json.loads(store.get(f"end/{rank}")) if store.check([f"end/{rank}"]) else None
    except Exception:
        return None


def _is_first_to_speak(store: Any) -> bool:
    """Whether nobody has spoken yet."""
    return store.add("spoken", 1) == 1


def _is_reachable(store: Any) -> bool:
    try:
        store.check(["said"])
    except Exception:
        return False
    return True


def _describe_ends(ends: Mapping[int, Mapping[str, Any]], size: int) -> str:
    errors: dict[str, list[int]] = {}
    for rank, end in sorted(ends.items()):
        if not end["is_lost"]:
            errors.setdefault(end["line"], []).append(rank)
    if len(errors) == 1 and 0 in next(iter(errors.values())):
        return next(iter(errors))  # an error of rank 0, or of all
    if errors:
        return "; ".join(f"rank {', '.join(map(str, ranks))}: {line}" for line, ranks in errors.items())
    absent = [rank for rank in range(size) if rank not in ends]
    who = f"rank {', '.join(map(str, absent))}" if absent else "a rank"
    reason = ends[min(ends)]["line"]
    if reason.startswith(WAITED):
        return f"{who} hangs (rank {min(ends)} {reason}, {TIMEOUT}): look at its machine; {_remedy()}"
    return f"{who} was lost: {_remedy()}"


_remedies: list[str] = []


def _remedy() -> str:
    return _remedies[-1] if _remedies else "start the command again"


@contextlib.contextmanager
def remedy(text: str) -> Iterator[None]:
    """What to do if a process is lost within it."""
    _remedies.append(text)
    yield
    _remedies.remove(text)
