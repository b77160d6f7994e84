"""Rows of instructions, and a process that reads datasets with another home."""

import os
import subprocess
import sys
from pathlib import Path

from builders import ROOT
from fgpt.data.prompt_templates import InstructionRow

JSON_ROWS = [
    {"instruction": "a", "input": "b", "output": "c\n\u2028d"},
    {"instruction": "é", "input": "", "output": "{x}"},
]
ROWS = [InstructionRow("a", "b", "c\n\u2028d"), InstructionRow("é", "", "{x}")]


def load_rows_elsewhere(home: Path, source: str, **env: str) -> str:
    """The rows of `source`, or the error, printed by another process: the libraries read their environment once."""
    code = f"""
import time
from fgpt.data.instruction_datasets import load_rows
from fgpt.errors import InputError
begin = time.perf_counter()
try:
    print(load_rows({source!r}))
except InputError as err:
    print("InputError", err)
assert time.perf_counter() - begin < 15
"""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "HF_HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n")
