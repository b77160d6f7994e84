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
    """The keys and values of the tokens that `forward_with_cache` has read. `KVCache()` is empty.

    Args:
        kv: The keys and values of each layer, both [*batch, head, past, d_head], after rotation by position.
        segments: The segment of each token; None if no call gave segments.

    >>> import fgpt, torch
    >>> cfg = fgpt.Config(n_layer=3, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> params = fgpt.init(cfg, fgpt.key(0))
    >>> _, cache = fgpt.forward_with_cache(params, torch.tensor([[1, 2]]), fgpt.KVCache())
    >>> len(cache.kv), cache.kv[0][0].shape
    (3, torch.Size([1, 2, 2, 4]))
    """

    kv: tuple[LayerKV, ...] = ()
    segments: Int[Tensor, "*batch past"] | None = None
