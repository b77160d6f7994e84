"""Commands and scripts that torchrun starts as several processes."""

import os
import shlex
import subprocess
import sys
from typing import Any

from builders import ROOT


def launch_together(count: int, *command: str, shell: bool = False, **env: str) -> "subprocess.Popen[str]":
    """A script of tests/scripts with its arguments, `-m MODULE ..`, or with `shell` a line that knows its $RANK."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    if shell:
        command = ("--no-python", "sh", "-c", shlex.join([sys.executable]) + " " + command[0])
    elif command[0] != "-m":
        command = (str(ROOT / "tests" / "scripts" / command[0]), *command[1:])
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment: Any = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, **env}
    streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*launcher, *command], text=True, env=environment, **streams)


def run_together(count: int, *command: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    """What `launch_together` launches, when it has ended."""
    process = launch_together(count, *command, **options)
    out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)
