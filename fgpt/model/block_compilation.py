"""A transformer block as one compiled program, which all blocks of one structure share, at every batch size and width."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fgpt.kernels.compilation import compile_whole, mark_varying
from fgpt.kernels.rotary import RopeCosSin


def compile_block(block: Callable[..., tuple[Tensor, Any]], name: str) -> Callable[..., tuple[Tensor, None]]:
    """`block` compiled, without the keys and values: as results, they would have gradients to be added.

    Args:
        block: From x, the weights, the config, a mask, the cache, a rope and more, to x and the keys and values.
        name: What a warning calls it.
    """

    def output(x: Tensor, p: Any, cfg: Any, mask: Tensor | None, rope: RopeCosSin | None, *more: Any) -> Tensor:
        return block(x, p, cfg, mask, None, rope, *more)[0]

    program = compile_whole(output, name)

    def call(
        x: Tensor, p: Any, cfg: Any, mask: Tensor | None, past: None, rope: RopeCosSin | None, *more: Any
    ) -> tuple[Tensor, None]:
        x = x.view_as(x) if torch.is_grad_enabled() else x.detach()  # whether it is differentiated then, is no case
        mark_varying(x, *range(x.ndim - 1))
        mask = None if mask is None else mark_varying(mask.view_as(mask), *range(mask.ndim))
        if rope is not None:
            cos, sin = (mark_varying(y.view_as(y), *range(y.ndim - 1)) for y in rope)
            rope = cos, sin
        rest = [mark_varying(y.view_as(y), *range(y.ndim)) if isinstance(y, Tensor) else y for y in more]
        return program(x, p, cfg, mask, rope, *rest), None

    return call
