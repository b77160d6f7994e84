"""IA3, which rescales the outputs or the inputs of a layer:

W' = diag(row) · W · diag(col)        bias' = row ⊙ bias
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fgpt.adapter_types import Adapters
from fgpt.errors import InputError
from fgpt.layers import adaptable_layers
from fgpt.tree import device, node, select
from fgpt.weights import Adapted, shape


@node
class IA3:
    """W' = diag(row) · W · diag(col), and bias' = row ⊙ bias: outputs rescaled, or inputs.

    Args:
        row: The factor of each output; None scales no outputs.
        col: The factor of each input; None scales no inputs.

    Source: Liu et al. 2022 (IA3), section 3.3.

    >>> import fgpt
    >>> base = {"layer": fgpt.model.Linear(torch.eye(2))}
    >>> adapted = fgpt.adapt(base, {"layer": fgpt.IA3(row=torch.tensor([3.0, 5.0]))})
    >>> fgpt.dense(adapted["layer"].w)
    tensor([[3., 0.],
            [0., 5.]])
    """

    row: Float[Tensor, " out"] | None = None
    col: Float[Tensor, " in"] | None = None

    def adapt_layer(self, layer: Any, path: str, seed: Int[Tensor, ""] | None) -> Any:
        """W' = diag(row) · W · diag(col), bias' = row ⊙ bias. There is no dropout: nothing reads `seed`."""
        for scale, size in zip((self.row, self.col), shape(layer.w), strict=True):
            if scale is not None and scale.shape[0] != size:
                raise InputError(f"IA3 at {path} scales {scale.shape[0]} components, but the base has {size}")
        adapted, bias = replace(layer, w=Adapted(layer.w, row=self.row, col=self.col)), getattr(layer, "b", None)
        if self.row is None or bias is None:
            return adapted
        return replace(adapted, b=(self.row * bias).to(bias.dtype))


def ia3(
    params: Any, rows: str | None = r"blocks\..*\.attn\.(k|v|qkv)", cols: str | None = r"blocks\..*\.mlp\.down"
) -> Adapters:
    """A fresh IA3 of ones on linear layers, which begins as the identity.

    Args:
        params: The base, quantized or not.
        rows: A regular expression for the layers whose outputs are scaled: by default keys and values, as in the
            paper; of a fused product, all of it. None scales no outputs.
        cols: A regular expression for the layers whose inputs are scaled. None scales no inputs.

    Raises:
        InputError: if a pattern matches nothing, or something that is not a linear layer.

    Source: Liu et al. 2022 (IA3), section 3.3.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> list(fgpt.ia3(fgpt.init(cfg, fgpt.key(0))))
    ['blocks.0.attn.k', 'blocks.0.attn.v', 'blocks.0.mlp.down']
    """
    layers = adaptable_layers(params)

    def ones(pattern: str | None, side: int) -> dict[str, Tensor]:
        scales: dict[str, Tensor] = {}
        for path in select(layers, pattern) if pattern else ():
            if not hasattr(layers[path], "b"):
                raise InputError(f"IA3 on {path}: expected a linear layer, got {type(layers[path]).__name__}")
            w = layers[path].w
            scales[path] = torch.ones(shape(w)[side], dtype=torch.float32, device=device({path: w}))
        return scales

    row, col = ones(rows, 0), ones(cols, 1)
    return {path: IA3(row.get(path), col.get(path)) for path in row | col}
