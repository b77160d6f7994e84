r"""What the layers of the blocks read: the second moments of their inputs, from a few texts.

    M = Σ x xᵀ        over the positions of the texts, x the input of y = W x

M is all that GPTQ knows of the data, and its eigenvectors are the principal directions of EVA. Layers that read the
same activation, such as q, k and v, share one M.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt.errors import InputError
from fgpt.kernels.precision import at_least_fp32
from fgpt.layers import weight_matrices
from fgpt.losses import Batch, text_positions
from fgpt.model import GPT, Tap, hidden
from fgpt.tree import select


class InputMoments(NamedTuple):
    """The second moments of a layer's input.

    Args:
        total: Σ x xᵀ, in at least fp32.
        num_positions: Of how many positions they are.
    """

    total: Float[Tensor, "in in"]
    num_positions: int


def input_point(params: GPT, path: str) -> str:
    r"""The point of `fgpt.model.taps` whose activation the layer at `path` reads.

    Raises:
        InputError: for a layer outside the blocks, such as an embedding or a head.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params = fgpt.init(config, fgpt.key(0))
    >>> [input_point(params, f"blocks.0.{layer}") for layer in ("attn.q", "attn.o", "mlp.up", "mlp.down")]
    ['blocks.0.ln_1', 'blocks.0.attn.z', 'blocks.0.ln_2', 'blocks.0.mlp.neurons']
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(?:attn|mlp)\.(\w+)", path)
    if match is None:
        raise InputError(f"the inputs of {path}: expected a layer of the blocks; narrow the target")
    i, layer = int(match[1]), match[2]
    mlp_norm = "ln_1" if params.blocks[i].ln_2 is None else "ln_2"
    points = {"o": "attn.z", "up": mlp_norm, "gate": mlp_norm, "down": "mlp.neurons"}
    return f"blocks.{i}.{points.get(layer, 'ln_1')}"


def input_rows(point: str, x: Tensor) -> Float[Tensor, "*batch seq in"]:
    """The activation at a point as the layers there read it: the values of all heads side by side."""
    return x.transpose(-3, -2).flatten(-2) if point.endswith(".z") else x


@torch.no_grad()
def input_moments(params: GPT, batches: Iterable[Batch], target: str = r"blocks\..*") -> dict[str, InputMoments]:
    r"""The second moments of the inputs of each layer whose path matches `target`, by path.

    Padding is left out, see `fgpt.losses.text_positions`. The layers of one input share their tensor.

    Args:
        params: The model, adapted or not.
        batches: The texts.
        target: A regular expression that matches the paths of layers in full.

    Raises:
        InputError: if `target` matches nothing or a layer outside the blocks, or if there is no batch.

    >>> import fgpt, torch
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params, text = fgpt.init(config, fgpt.key(0)), torch.tensor([[1, 2, 3, 4]])
    >>> moments = input_moments(params, [fgpt.Batch(text, text, torch.ones(1, 4))], target=r".*\.(up|down)")
    >>> [(path, list(m.total.shape), m.num_positions) for path, m in moments.items()]
    [('blocks.0.mlp.up', [8, 8], 4), ('blocks.0.mlp.down', [16, 16], 4)]
    """
    points = {path: input_point(params, path) for path in select(weight_matrices(params), target)}
    selector = "|".join(re.escape(point) for point in dict.fromkeys(points.values()))
    totals: dict[str, Any] = {}
    count = 0
    for batch in batches:
        is_text = text_positions(batch)
        count += int(is_text.sum())

        def add(point: str, x: Tensor, is_text: Tensor = is_text) -> Tensor:
            rows = at_least_fp32(input_rows(point, x)[is_text])
            totals[point] = rows.T @ rows + totals.get(point, 0)
            return x

        hidden(params, batch.tokens, batch.segments, cu_seqlens=batch.cu_seqlens, tap=Tap(add, selector))
    if not count:
        raise InputError("the second moments of layer inputs need at least one batch with text in it")
    return {path: InputMoments(totals[point], count) for path, point in points.items()}
