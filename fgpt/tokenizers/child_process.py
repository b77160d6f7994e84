"""Programs that read untrusted input, each in a process of its own: a hang, a crash or a full memory ends only that.

A program is a file in this folder with a function `answer`, from a request to a response, each a line of JSON, and a
constant `MEMORY`, the bytes that its process may map. The process runs this file, which does not import fgpt, so that
it starts fast:

    python child_process.py PROGRAM SECONDS
"""

import atexit
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Child:
    """A process that runs a program.

    It starts with the first request, and ends if a response takes more than `seconds`.
    """

    def __init__(self, program: str, seconds: int) -> None:
        self.program, self.seconds = program, seconds
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.owner = 0

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """The response to a request; None if the process reached its limits or crashed. The next request then starts
        another process.
        """
        with self.lock:
            process = self.process
            if process is None or process.poll() is not None or self.owner != os.getpid():  # not shared after a fork
                process, self.owner = self._start(), os.getpid()
                self.process = process
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                return json.loads(process.stdout.readline())
            except BaseException as err:  # a response left unread would be taken for the next one
                process.kill()
                self.process = None
                if isinstance(err, OSError | ValueError):  # the process has ended
                    return None
                raise

    def _start(self) -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        command = [sys.executable, "-P", __file__, self.program, str(self.seconds)]  # -P: imports nothing beside it
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        atexit.register(process.kill)
        return process


# ------------------------------------------------------------------------------------------------- in the process


def limit(memory: int) -> None:
    """Limit the memory of this process, if the system supports it."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (memory, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def load(program: str) -> Any:
    spec = importlib.util.spec_from_file_location("program", Path(__file__).with_name(program))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(program: str, seconds: int) -> None:
    module = load(program)
    limit(module.MEMORY)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # left to the caller
    for line in sys.stdin:
        if hasattr(signal, "alarm"):
            signal.alarm(seconds)  # ends the process by a signal
        response = json.dumps(module.answer(json.loads(line)))
        if hasattr(signal, "alarm"):
            signal.alarm(0)
        print(response, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
