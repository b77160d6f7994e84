"""Importing fgpt changes nothing and is quick."""

import json
import subprocess
import sys

import pytest
from builders import ROOT

PROBE = """
import json, logging, os, sys, time, warnings
import torch
def state():
    return {
        "dtype": str(torch.get_default_dtype()), "device": str(torch.get_default_device()),
        "grad": torch.is_grad_enabled(), "threads": torch.get_num_threads(), "seed": torch.initial_seed(),
        "rng": torch.get_rng_state().tolist(), "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "cudnn": [torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32],
        "print": str(torch._tensor_str.PRINT_OPTS), "env": dict(os.environ), "cwd": os.getcwd(), "path": sys.path,
        "warnings": [str(f) for f in warnings.filters], "handlers": [str(h) for h in logging.root.handlers],
        "level": logging.root.level, "hook": str(sys.excepthook),
    }
before = json.dumps(state())
start = time.process_time()
import fgpt
took = time.process_time() - start
after = json.dumps(state())
heavy = "torch._dynamo matplotlib datasets transformers pandas pyarrow bitsandbytes huggingface_hub tyro".split()
print(json.dumps([json.loads(before), json.loads(after), [m for m in heavy if m in sys.modules], took]))
"""


@pytest.mark.slow
def test_importing_changes_nothing_and_is_quick():
    """Under a second beyond torch (of CPU, so that a busy machine tells the same; the best of three), nothing heavy."""
    took = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=True)
        before, after, heavy, seconds = json.loads(done.stdout)
        assert before == after
        assert heavy == []
        assert done.stderr == ""
        took.append(seconds)
    assert min(took) < 1.0


WITHOUT_POSIX = """
import importlib, pkgutil, signal, sys
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None  # its import fails, as on Windows
del signal.SIGHUP
import fgpt
for module in pkgutil.walk_packages(fgpt.__path__, "fgpt."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
import torch
from fgpt.cli.devices import peak_memory
assert peak_memory(torch.device("cpu")) == 0
"""


def test_every_module_is_imported_without_posix():
    done = subprocess.run([sys.executable, "-c", WITHOUT_POSIX], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
