"""The keys and values that a model keeps of the tokens it has read."""

from typing import TypeAlias

from jaxtyping import Float, Int
from torch import Tensor

from fgpt.tree import node

LayerKV: TypeAlias = tuple[
    Float[Tensor, "*batch head _past d_head"], Float[Tensor, "*batch head _past d_head"]
]  # it grows


@node
class StaticLayerCache:
    """Room for the keys and values of a layer's tokens, written in place from slot `at`: see `fgpt.decode`."""

    k: Float[Tensor, "*batch head room d_head"]
    v: Float[Tensor, "*batch head room d_head"]
    write_index: Int[Tensor, " seq"]


@node
class KVCache:
    """What `extend` remembers of the tokens it has seen: keys and values by layer, and the tokens' segments."""

    kv: tuple[LayerKV, ...] = ()
    segments: Int[Tensor, "*batch past"] | None = None
