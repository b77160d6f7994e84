"""A transformer block as one compiled program, which all blocks of one structure share, at every size of a batch."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fgpt.kernels.compilation import compile_whole, mark_varying
from fgpt.kernels.documents import Documents
from fgpt.kernels.rotary import RopeCosSin
from fgpt.tree import tree_leaves


def compile_block(block: Callable[..., tuple[Tensor, Any]], name: str) -> Callable[..., tuple[Tensor, None]]:
    """`block` compiled, without the keys and values: as results, they would have gradients to be added.

    Args:
        block: From x, the weights, the config, a mask, the cache, a rope and more, to x and the keys and values.
        name: What a warning calls it.
    """

    def output(
        x: Tensor, p: Any, cfg: Any, mask: Tensor | Documents | None, rope: RopeCosSin | None, *more: Any
    ) -> Tensor:
        return block(x, p, cfg, mask, None, rope, *more)[0]

    def mark(x: Tensor, p: Any, cfg: Any, mask: Tensor | Documents | None, rope: RopeCosSin | None, *more: Any) -> None:
        mark_varying(x, *range(x.ndim - 1))
        for y in rope or ():
            mark_varying(y, *range(y.ndim - 1))
        for y in tree_leaves([mask, *more]):
            if isinstance(y, Tensor):
                mark_varying(y, *range(y.ndim))

    program = compile_whole(output, name, mark)

    def call(
        x: Tensor, p: Any, cfg: Any, mask: Tensor | Documents | None, past: None, rope: RopeCosSin | None, *more: Any
    ) -> tuple[Tensor, None]:
        return program(x, p, cfg, mask, rope, *more), None

    return call
