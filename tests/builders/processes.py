"""Several processes of one command, as torchrun starts them, but forked: what they import is there already."""

import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from builders.resume import exit_status, run_in_fork


def free_port() -> int:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


def start_processes(
    args: Sequence[str] | Sequence[Sequence[str]],
    count: int,
    log: Path,
    *,
    port: int | None = None,
    spoil: Callable[[int], Any] = lambda rank: None,
    **env: str,
) -> list[int]:
    """Their process numbers, by rank. What they print on stderr goes to the file `log`.

    Args:
        args: The command line, or one for each rank.
        count: How many there are.
        log: A file.
        port: Where they meet; None takes a free one.
        spoil: Called in each with its rank, before the command.
        env: Variables of their environment.
    """
    port = port or free_port()
    log.write_text("")
    commands = [list(args) if isinstance(args[0], str) else list(args[rank]) for rank in range(count)]

    def prepare(rank: int) -> None:
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)  # pytest has replaced it
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "RANK": str(rank)}
        os.environ.update(meeting | env)
        spoil(rank)

    return [run_in_fork(command, lambda rank=rank: prepare(rank)) for rank, command in enumerate(commands)]


def run_processes(args: Sequence[str] | Sequence[Sequence[str]], count: int, log: Path, **others: Any) -> list[int]:
    """The exit codes of `start_processes`, by rank."""
    return [exit_status(pid) for pid in start_processes(args, count, log, **others)]


def errors_in(log: Path) -> list[str]:
    """The lines of errors, tracebacks included."""
    lines = log.read_text().splitlines()
    return [line for line in lines if line.startswith(("error:", "Traceback", "RuntimeError"))]
