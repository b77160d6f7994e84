"""Where a command computes, and in what: the device and the dtype that "auto" means on this machine."""

import dataclasses
from pathlib import Path
from typing import TypeVar

import torch

from fgpt.cli import host_memory
from fgpt.errors import InputError
from fgpt.recipes import FineTuningRecipe, TrainingRecipe

R = TypeVar("R", bound=TrainingRecipe)


def resolve_device(name: str) -> torch.device:
    """The torch device of a name; "auto" takes CUDA if there is one. Raises InputError if it cannot be used."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as err:
        raise InputError(
            f"device {name!r} cannot be used ({str(err).splitlines()[0]}); leave --device out, or give cpu"
        ) from None
    if device.type == "cuda":
        _avoid_plans()
    return device


def _avoid_plans() -> None:
    """Turn cuDNN's attention off, for this process: it builds a plan for each new shape, which takes far longer than
    the attention. Decoding has one more key with each token, and batches of evaluation and packed rows have any width.
    Flash and memory-efficient attention take every shape as it is.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name; "auto" takes bfloat16 on a GPU that multiplies it natively, else float32."""
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if device.type == "cuda" and _has_bf16(device) else torch.float32


def _has_bf16(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def resolve_precision(recipe: R) -> R:
    """The recipe with the dtype that "auto" means here: what run.json records, so that the run is resumed, replayed and
    used elsewhere in the dtype that it was trained in.

    Raises InputError if its device cannot be used, or cannot record the CUDA graphs that it asks for.
    """
    device = resolve_device(recipe.device)
    if isinstance(recipe, FineTuningRecipe) and recipe.cuda_graphs:
        check_cuda_graphs(device)
    dtype = resolve_dtype(recipe.dtype, device)
    return dataclasses.replace(recipe, dtype=str(dtype).removeprefix("torch."))


def check_cuda_graphs(device: torch.device) -> None:
    """Raises InputError for a device that has none."""
    if device.type != "cuda":
        raise InputError(f"--cuda-graphs needs a CUDA device, and this training runs on {device}: leave it out")


def describe_precision(recipe: TrainingRecipe) -> str:
    """Such as "bfloat16 on cuda"."""
    device = resolve_device(recipe.device)
    return f"{str(resolve_dtype(recipe.dtype, device)).removeprefix('torch.')} on {device}"


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device: what torch holds without use counts, and a container's limit."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    limits = [_available_memory()]
    group, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if group.is_file() and used.is_file() and (limit := group.read_text().strip()) != "max":
        limits.append(int(limit) - int(used.read_text()))
    return max(0, min(limits))


def peak_memory(device: torch.device) -> int:
    """The most bytes in use so far: of the device, or of the process on a CPU; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return host_memory.peak()


def _available_memory() -> int:
    """Of the machine, as far as it tells: of another system than Linux, 8 GB."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 8 << 30
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
