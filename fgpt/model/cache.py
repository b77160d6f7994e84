"""The keys and values that a model keeps of the tokens it has read."""

from typing import TypeAlias

from jaxtyping import Float, Int
from torch import Tensor

from fgpt.tree import node

LayerKV: TypeAlias = tuple[Float[Tensor, "*batch head _past d_head"], Float[Tensor, "*batch head _past d_head"]]
"""Keys and values of one layer; the axis `past` grows with every token."""


@node
class StaticLayerCache:
    """Keys and values of one layer in tensors of a fixed size, written in place: see `fgpt.generation.static_cache`."""

    k: Float[Tensor, "*batch head slot d_head"]
    v: Float[Tensor, "*batch head slot d_head"]
    write_index: Int[Tensor, " seq"]
    """The slots that the next tokens take."""


@node
class KVCache:
    """The tokens that `forward_with_cache` has read: keys and values by layer, and the tokens' segments. `KVCache()` is
    empty.
    """

    kv: tuple[LayerKV, ...] = ()
    segments: Int[Tensor, "*batch past"] | None = None
