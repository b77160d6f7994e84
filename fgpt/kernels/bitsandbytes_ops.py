"""bitsandbytes' raw operators, imported at first use: its import takes longer than the rest of fgpt."""

import functools
import logging
from typing import Any

import torch

from fgpt.kernels.functorch_state import in_transform_or_compile

CPU = torch.device("cpu")


@functools.cache
def register() -> None:
    """Put bitsandbytes' operators under `torch.ops.bitsandbytes`.

    Code that creates quantized nodes calls this first, so that the kernels, which may be compiled, need not.
    """
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns about an optional kernel package that is not used here
    try:
        import bitsandbytes  # noqa: F401  # pyright: ignore[reportUnusedImport]
    finally:
        log.setLevel(level)


def dynamic_code(signed: bool = True, device: torch.device = CPU) -> torch.Tensor:
    """The 256 values of the dynamic 8-bit code, ascending, in [-1, 1], or in [0, 1] if unsigned.

    Source: Dettmers 2016, section 2.2; Dettmers et al. 2022 (8-bit optimizers), section 1.3.
    """
    # A copy made under a transform belongs to that transform and must not outlive it in a cache.
    return _code(signed).to(device) if in_transform_or_compile() else _code_on(signed, device)


@functools.cache
def _code_on(signed: bool, device: torch.device) -> torch.Tensor:
    return _code(signed).to(device)


@functools.cache
def _code(signed: bool) -> torch.Tensor:
    register()
    from bitsandbytes.functional import create_dynamic_map

    code: Any = create_dynamic_map(signed)
    return code.float()
