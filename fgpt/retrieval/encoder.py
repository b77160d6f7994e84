"""The encoder of BERT as a pure function of its params tree, and the embedding of a text by it:

    x = ln_embedding(wte[tokens] + wpe[positions] + wtt[0])
    x = ln_1(x + attn(x));  x = ln_2(x + mlp(x))            for each block: norms stand after the sums
    embedding = mean_i x_i / ‖mean_i x_i‖                   over the tokens that are not padding

Every token sees every other. The tree is made of the nodes of a GPT, so adapters and quantization are the same.

Source: Devlin et al. 2019 (BERT), section 3; Reimers and Gurevych 2019 (Sentence-BERT), section 3.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fgpt.kernels.attention import attention
from fgpt.kernels.precision import at_least_fp32
from fgpt.model import MLP, Attention, Embedding, Norm
from fgpt.model.forward import norm
from fgpt.tree import node, static
from fgpt.weights import embed, linear, linear_group


@node
class EncoderBlock:
    """A block whose norms stand after the sums."""

    attn: Attention
    ln_1: Norm
    mlp: MLP
    ln_2: Norm


@node
class Encoder:
    """An encoder.

    Args:
        wte: The token embedding, [vocab, d_model].
        wpe: The embedding of positions, [n_ctx, d_model].
        wtt: The embedding of token types, of which a text by itself has the first.
        ln_embedding: The norm of their sum.
        blocks: The transformer blocks.
        n_head: Heads of attention.
        norm_eps: Added to the variance in every norm.
    """

    wte: Embedding
    wpe: Embedding
    wtt: Embedding
    ln_embedding: Norm
    blocks: tuple[EncoderBlock, ...]
    n_head: int = static()
    norm_eps: float = static()


def encode(
    params: Encoder, tokens: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq d_model"]:
    """The last hidden states.

    Args:
        params: The encoder; adapted and quantized ones are read as any.
        tokens: The texts, padded at their ends by any token.
        mask: Whether a token is one of the text. Each text has one at least.
    """
    length = tokens.shape[-1]
    positions = torch.arange(length, device=tokens.device)
    x = embed(tokens, params.wte.w) + embed(positions, params.wpe.w) + embed(torch.zeros_like(positions), params.wtt.w)
    x = norm(x, params.ln_embedding, params.norm_eps)
    visible = mask[:, None, None, :].expand(-1, -1, length, -1)
    for block in params.blocks:
        x = norm(x + _attend(x, block.attn, visible, params.n_head), block.ln_1, params.norm_eps)
        x = norm(x + _feed_forward(x, block.mlp), block.ln_2, params.norm_eps)
    return x


def _attend(
    x: Float[Tensor, "batch seq d_model"], p: Attention, visible: Bool[Tensor, "batch 1 seq seq"], n_head: int
) -> Float[Tensor, "batch seq d_model"]:
    flat = linear_group(x, [(p.q.w, p.q.b), (p.k.w, p.k.b), (p.v.w, p.v.b)])
    q, k, v = (y.unflatten(-1, (n_head, -1)).transpose(-3, -2) for y in flat)
    return linear(attention(q, k, v, visible).transpose(-3, -2).flatten(-2), p.o.w, p.o.b)


def _feed_forward(x: Float[Tensor, "batch seq d_model"], p: MLP) -> Float[Tensor, "batch seq d_model"]:
    return linear(F.gelu(linear(x, p.up.w, p.up.b)), p.down.w, p.down.b)


def embed_texts(
    params: Encoder, tokens: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "batch d_model"]:
    """The embedding of each text, of norm 1: their inner products are the cosines of the angles between them.

    Args: as for `encode`.

    >>> from fgpt.model import Linear
    >>> def layer(out, inp):
    ...     return Linear(torch.randn(out, inp), torch.zeros(out))
    >>> ln = Norm(torch.ones(4), torch.zeros(4))
    >>> attn, mlp = Attention(*[layer(4, 4) for _ in range(4)]), MLP(layer(8, 4), layer(4, 8))
    >>> tables = [Embedding(torch.randn(rows, 4)) for rows in (10, 6, 2)]
    >>> params = Encoder(*tables, ln, (EncoderBlock(attn, ln, mlp, ln),), n_head=2, norm_eps=1e-12)
    >>> alone = embed_texts(params, torch.tensor([[1, 2]]), torch.tensor([[True, True]]))
    >>> beside = embed_texts(params, torch.tensor([[1, 2, 9]]), torch.tensor([[True, True, False]]))
    >>> torch.allclose(alone, beside, atol=1e-5)
    True
    """
    x = at_least_fp32(encode(params, tokens, mask))
    weights = mask[..., None].to(x.dtype)
    return F.normalize((weights * x).sum(1) / weights.sum(1), dim=-1)
