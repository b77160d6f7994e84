"""Programs that read what may do harm, each in a process of its own: a hang, a crash or a full memory ends there.

A program is a file beside this one with a function `answer`, from what a line of JSON says to what the answering line
is to say, and the `MEMORY` in bytes that its process may map. The process runs this very file, which imports no fgpt,
so that it starts fast:

    python child.py PROGRAM SECONDS
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
    """A process that runs a program, started when the first answer is asked for, with `seconds` for each."""

    def __init__(self, program: str, seconds: int) -> None:
        self.program, self.seconds = program, seconds
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.owner = 0

    def ask(self, asked: Mapping[str, Any]) -> dict[str, Any] | None:
        """What it answers; None if it came to its limits or crashed. The next is then asked of another process."""
        with self.lock:
            process = self.process
            if process is None or process.poll() is not None or self.owner != os.getpid():  # a fork may not share it
                process, self.owner = self._start(), os.getpid()
                self.process = process
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps(asked) + "\n")
                process.stdin.flush()
                return json.loads(process.stdout.readline())
            except BaseException as err:  # an answer that is not awaited would be taken for the next one's
                process.kill()
                self.process = None
                if isinstance(err, OSError | ValueError):  # it has ended: nothing can be written, or is read
                    return None
                raise

    def _start(self) -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        command = [sys.executable, "-P", __file__, self.program, str(self.seconds)]  # -P: no neighbor is imported
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        atexit.register(process.kill)
        return process


# ------------------------------------------------------------------------------------------------- in the process


def limit(memory: int) -> None:
    """Where the system has such limits."""
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller's to answer
    for line in sys.stdin:
        if hasattr(signal, "alarm"):
            signal.alarm(seconds)  # whose signal ends the process, whatever it is at
        reply = json.dumps(module.answer(json.loads(line)))
        if hasattr(signal, "alarm"):
            signal.alarm(0)
        print(reply, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
