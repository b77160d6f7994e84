"""Programs that read what may do harm, each in a process of its own: a hang, a crash or a full memory ends there."""

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Child:
    """A program beside this file that answers each line of JSON with one, started when the first is asked for.

    It is given `seconds` for each; how much memory it may take is its own affair.
    """

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
        program = [sys.executable, "-P", str(Path(__file__).with_name(self.program))]  # -P: no neighbor is imported
        process = subprocess.Popen(
            [*program, str(self.seconds)], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        atexit.register(process.kill)
        return process
