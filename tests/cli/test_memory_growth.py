"""Memory that stays where it is, over a thousand steps and a thousand texts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders import ROOT

MAX_GROWTH = 2_000_000
"""Bytes of growth that pass, the allocator's unrest: 2 kB a time."""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell a process's memory")
@pytest.mark.parametrize("what", ["steps", "leak", "texts"])
def test_a_thousand_times(what: str):
    """Steps and texts keep nothing; and the measure sees a training that does."""
    script = ROOT / "tests" / "scripts" / "memory_growth.py"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script, what], stdout=subprocess.PIPE, text=True, env=env, check=True)
    growth = int(done.stdout)
    assert (growth > MAX_GROWTH) == (what == "leak"), f"{growth:,} bytes"
