"""Commands as processes, and trainings short enough to be interrupted."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fgpt.cli.commands import COMMANDS
from fgpt.cli.completion import option_classes
from fgpt.cli.main import main

ODD_NAME = "[/red]x[b] :smile:"
"""A name that a console could take for markup."""


def training_options(at: Path) -> list[str]:
    base = ["--base", str(at / "base"), "--data", str(at / "rows.json"), "--num-heldout", "4"]
    return [
        "lora-nano",
        *base,
        "--max-seq-len",
        "80",
        "--micro-batch-size",
        "2",
        "--steps",
        "3",
        "--out",
        str(at / "runs"),
    ]


OPTION_CLASSES: list[type[Any]] = [
    *dict.fromkeys(cls for classes in option_classes(COMMANDS).values() for cls in classes)
]
"""Every class whose fields are options of some command."""


class CommandProcess:
    """A command in a process of its own, with what is imported already; its streams are pipes, or what is given."""

    def __init__(
        self,
        args: list[str],
        prepare: Callable[[], Any] = lambda: None,
        stdout: int | None = None,
        stderr: int | None = None,
        encoding: str = "utf-8",
    ) -> None:
        ours = [os.pipe() if stream is None else (None, stream) for stream in (stdout, stderr)]
        self.pid = os.fork()
        if not self.pid:
            self._run(args, prepare, [write for _, write in ours], encoding)
        for _, write in ours:
            os.close(write)
        self.stdout, self.stderr = (None if read is None else os.fdopen(read, errors="replace") for read, _ in ours)

    def _run(self, args: list[str], prepare: Callable[[], Any], streams: list[int], encoding: str) -> None:
        code = 70
        try:
            torch.set_num_threads(1)  # no pool of threads outlives a fork
            os.dup2(streams[0], 1)
            os.dup2(streams[1], 2)
            sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", 1, encoding=encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
            prepare()
            code = main(args)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def hear(self, text: str) -> None:
        """Wait until it has said this on stderr."""
        output = ""
        assert self.stderr is not None
        for line in self.stderr:
            output += line
            if text in line:
                return
        raise AssertionError(f"it ended, and never said {text!r}: {output}")

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> tuple[int, str, str]:
        """Its exit status, negative for a signal, and what it said since."""
        out, err = ("" if stream is None else stream.read() for stream in (self.stdout, self.stderr))
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), out, err
