"""Versions, machine and commit of a run, without host, user or paths."""

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
"""Packages whose versions can change results."""

CODE = ("fgpt", "experiments", "pyproject.toml", "constraints.txt")
"""The parts of a clone that a run depends on: changes elsewhere leave it clean."""


def environment() -> dict[str, Any]:
    """The content of environment.json. None is what is unknown, or not there. It can be shared: it names no host, user
    or path.
    """
    release = platform.release().partition("-")[0]  # the rest is of who built the kernel
    return {
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
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
    """The name of the CPU if the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return _command_output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or None
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or None)


def _memory() -> float | None:
    """The memory of the machine in GB. psutil would be one more package for this number."""
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
    """The commit of the code, and whether there are no changes; both None if `root` is not a clone.

    Installed packages can be inside another repository, whose commit would be wrong: `root` itself must be the clone.
    """
    commit = _command_output("git", "-C", str(root), "rev-parse", "HEAD") if (root / ".git").exists() else None
    changed = _command_output("git", "-C", str(root), "status", "--porcelain", "--", *CODE) if commit else None
    return {"commit": commit, "clean": None if changed is None else not changed}


def _command_output(*command: str) -> str | None:
    """The output of a program; None if it is missing, fails, or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
