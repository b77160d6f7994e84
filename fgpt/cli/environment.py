"""What a run was made with: versions, machine and commit, and nothing that says whose machine it was."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fgpt

PACKAGES = (
    "fgpt",
    "torch",
    "bitsandbytes",
    "numpy",
    "safetensors",
    "tokenizers",
    "tiktoken",
    "gguf",
    "datasets",
    "pyarrow",
    "huggingface_hub",
    "scikit-learn",
)
"""Those whose versions can change a figure."""

CODE = ("fgpt", "experiments", "pyproject.toml", "constraints.txt")
"""Of a clone, what a run is made by: changes elsewhere leave it clean."""


def environment() -> dict[str, Any]:
    """What environment.json holds. None stands for what cannot be found out, and for what is not there.

    There is no host, user or path in it, so that it can be shown to anybody.
    """
    release = platform.release().partition("-")[0]  # what follows is whoever built the kernel's
    return {
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "platform": f"{platform.system()} {release} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "memory_gb": _memory(),
        "gpu": _gpu(),
    } | _commit(Path(fgpt.__file__).parent.parent)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str | None:
    """The model's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return _command_output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or None
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor() or None)


def _memory() -> float | None:
    """Of the machine, in GB."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    gpu = torch.cuda.get_device_properties(0)
    return {
        "name": gpu.name,
        "memory_gb": round(gpu.total_memory / 1e9, 1),
        "number": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
    }


def _commit(root: Path) -> dict[str, Any]:
    """The commit of the code, and whether it is as committed; both None where the code is no clone's.

    A folder of installed packages can lie inside somebody's own repository, whose commit would say nothing: `root`
    itself has to be the clone.
    """
    commit = _command_output("git", "-C", str(root), "rev-parse", "HEAD") if (root / ".git").exists() else None
    changed = _command_output("git", "-C", str(root), "status", "--porcelain", "--", *CODE) if commit else None
    return {"commit": commit, "clean": None if changed is None else not changed}


def _command_output(*command: str) -> str | None:
    """What a program prints; None where it is absent, fails, or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
