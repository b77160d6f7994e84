"""Trainable tokens, rows of an embedding or a head that are trained while the others stay:

W' = W + E·(R - W[ids])        row i of W' is row j of R if ids[j] is i, else row i of W
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fgpt.adapter_types import Adapters
from fgpt.errors import InputError
from fgpt.kernels.precision import at_least_fp32
from fgpt.layers import weight_matrices
from fgpt.tree import device, node, select, static
from fgpt.weights import Adapted, embed, shape


@node
class TrainableTokens:
    """W' = W with other rows at `ids`: the low-rank form with A = R - W[ids], and for B the columns E of the identity.
    Where the head is the embedding table, both read the rows.

    It costs as much as a LoRA whose rank is the number of rows.

    Args:
        rows: R, what stands at `ids`. `trainable_tokens` begins with the base's own rows.
        ids: The rows of the table, each once.

    Source: PEFT's `TrainableTokensConfig`, and `trainable_token_indices` of its LoRA.

    >>> import fgpt
    >>> base = {"table": fgpt.model.Embedding(torch.zeros(3, 2))}
    >>> adapted = fgpt.adapt(base, {"table": fgpt.TrainableTokens(torch.ones(1, 2), ids=(1,))})
    >>> fgpt.dense(adapted["table"].w)
    tensor([[0., 0.],
            [1., 1.],
            [0., 0.]])
    """

    rows: Float[Tensor, "n in"]
    ids: tuple[int, ...] = static()

    def adapt_layer(self, layer: Any, path: str, seed: Int[Tensor, ""] | None) -> Any:
        """W' = W + E·(R - W[ids]). There is no dropout: nothing reads `seed`."""
        vocab, size = shape(layer.w)
        _check_ids(self.ids, vocab, path)
        if self.rows.shape != (len(self.ids), size):
            raise InputError(
                f"trainable tokens at {path} have rows of {list(self.rows.shape)}; expected {[len(self.ids), size]}"
            )
        ids = torch.tensor(self.ids, device=self.rows.device)
        old = embed(ids, layer.w).to(self.rows.dtype)
        columns = torch.arange(vocab, device=ids.device)[:, None] == ids  # no index_put: every transform follows it
        return replace(layer, w=Adapted(layer.w, a=self.rows - old, b=columns.to(self.rows.dtype)))


def _check_ids(ids: Sequence[int], vocab: int, path: str) -> None:
    if not ids:
        raise InputError(f"no tokens to train at {path}: expected one id or more")
    if wrong := [x for x in ids if not 0 <= x < vocab]:
        raise InputError(
            f"token {wrong[0]} has no row at {path}: expected ids from 0 to {vocab - 1}; `add_tokens` makes rows for "
            "new tokens"
        )
    if len(set(ids)) < len(ids):
        twice = next(x for i, x in enumerate(ids) if x in ids[:i])
        raise InputError(f"token {twice} is given twice at {path}: expected each id once")


def trainable_tokens(params: Any, ids: Sequence[int], target: str = "wte|head") -> Adapters:
    """The rows of some tokens as adapters, in fp32 (fp64 stays). They begin as the base's own rows, and so as the
    identity, to the bit.

    Args:
        params: The base, quantized or not.
        ids: Token ids, each once; `add_tokens` gives those of new tokens.
        target: A regular expression that matches a layer's path in full. By default the embedding, and a head of its
            own; a head that is the embedding reads the embedding's rows.

    Raises:
        InputError: if there is no id, an id is given twice or has no row, or `target` matches nothing.

    Source: PEFT's `trainable_token_indices`.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> params = fgpt.init(cfg, fgpt.key(0))
    >>> adapters = fgpt.lora(params, fgpt.key(1), rank=2) | fgpt.trainable_tokens(params, [8, 9])
    >>> adapters["wte"].rows.shape
    torch.Size([2, 8])
    """
    weights = weight_matrices(params)
    adapters: Adapters = {}
    for path in select(weights, target):
        w, numbers = weights[path], tuple(int(x) for x in ids)
        _check_ids(numbers, shape(w)[0], path)
        rows = embed(torch.tensor(numbers, device=device({path: w})), w)
        adapters[path] = TrainableTokens(at_least_fp32(rows), numbers)
    return adapters
