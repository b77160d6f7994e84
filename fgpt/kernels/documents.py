"""Packed rows, whose tokens attend to earlier tokens of their own document alone: a mask of block matrices, known by
where the documents begin.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fgpt.errors import InputError
from fgpt.kernels.functorch_state import is_mapped
from fgpt.tree import node


@node
class Documents:
    """The documents of packed rows, one after the other; padding is one more. In place of a mask, which it implies.

    Args:
        cu_seqlens: Where each document of a row begins and the last one ends: 0, the length of the first, that of the
            first two, .., the length of the row. A row with fewer documents than another has empty ones at its end, so
            the length of the row is repeated.

    >>> documents = Documents(torch.tensor([[0, 2, 3]]))
    >>> documents.positions(3), documents.mask(3).int()
    (tensor([[0, 1, 0]]), tensor([[[[1, 0, 0],
              [1, 1, 0],
              [0, 0, 1]]]], dtype=torch.int32))
    """

    cu_seqlens: Int[Tensor, "*batch n"]

    def check(self, tokens: Int[Tensor, "*batch seq"]) -> None:
        """Raises InputError if the bounds are not those of `tokens`. On a CPU their values are looked at too, which on
        a GPU would wait for it; and not those that vmap maps, at which attention looks.
        """
        bounds, seq = self.cu_seqlens, tokens.shape[-1]
        if bounds.shape[:-1] != tokens.shape[:-1] or bounds.shape[-1] < 2 or bounds.device != tokens.device:
            raise InputError(
                f"cu_seqlens of tokens of shape {list(tokens.shape)} on {tokens.device}: expected two bounds or more "
                f"for each row, on that device; got shape {list(bounds.shape)} on {bounds.device}"
            )
        if torch.compiler.is_compiling() or bounds.device.type != "cpu" or is_mapped(bounds):
            return
        wrong = (bounds[..., 0] != 0) | (bounds[..., -1] != seq) | (bounds.diff(dim=-1) < 0).any(-1)
        if wrong.any():
            raise InputError(
                f"cu_seqlens of a row of {seq} tokens ascend from 0 to {seq}: got {bounds[wrong][0].tolist()}"
            )

    def _document(self, seq: int) -> Int[Tensor, "*batch seq"]:
        """The number of each token's document: so many end at the token or before."""
        places = torch.arange(seq, device=self.cu_seqlens.device)
        return (places[:, None] >= self.cu_seqlens[..., None, 1:]).sum(-1)

    def positions(self, seq: int) -> Int[Tensor, "*batch seq"]:
        """The position of each of the `seq` tokens of a row in its document."""
        places = torch.arange(seq, device=self.cu_seqlens.device)
        return places - self.cu_seqlens.gather(-1, self._document(seq))

    def lengths(self, seq: int) -> Int[Tensor, "*batch seq"]:
        """The length of the document of each of the `seq` tokens of a row."""
        return self.cu_seqlens.diff(dim=-1).long().gather(-1, self._document(seq))

    def mask(self, seq: int) -> Bool[Tensor, "*batch 1 seq seq"]:
        """True if a token sees another: one of its own document, not after it."""
        document = self._document(seq)
        same = document[..., :, None] == document[..., None, :]
        return (same & same.new_ones(seq, seq).tril())[..., None, :, :]
