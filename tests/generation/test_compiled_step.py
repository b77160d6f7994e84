"""The compiled step of decoding writes what the eager one does."""

import subprocess
import sys

import pytest
from builders import ROOT


@pytest.mark.slow
def test_the_compiled_step():
    """In a process of its own: the whole-package check of these tests is what a compiler cannot trace."""
    file = ROOT / "tests" / "scripts" / "compiled_decode.py"
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    done = subprocess.run([sys.executable, "-m", "pytest", *options, file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "7 passed" in done.stdout
