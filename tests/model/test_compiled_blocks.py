"""Compiled blocks are the blocks, and what is not compiled is reported."""

import subprocess
import sys

import pytest
from builders import ROOT


@pytest.mark.slow
def test_compiled_blocks():
    """In a process of its own: the whole-package check of these tests is what a compiler cannot trace."""
    file = ROOT / "tests" / "scripts" / "compiled_blocks.py"
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "--show-capture=no"]
    done = subprocess.run([sys.executable, "-m", "pytest", *options, file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
