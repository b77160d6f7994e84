"""Batches, and the loss of a model on one."""

from jaxtyping import Float, Int
from torch import Tensor

from fgpt._typing import shaped
from fgpt.kernels.cross_entropy import cross_entropy
from fgpt.model import GPT, hidden, lm_head
from fgpt.tree import node
from fgpt.weights import linear_terms


@node
class Batch:
    """Rows of tokens, and what is asked of them.

    `targets[i]` is the token to predict at position i (the text's token i + 1), `weights[i]` what that prediction
    counts: 0 where nothing is asked. `segments` is None where every row is one document, padded on the right at most:
    the causal mask alone then keeps padding out. `at` lists the flat positions with weight, so that logits are computed
    nowhere else; None computes them everywhere, which suits vmap over rows and whole-text training.
    """

    tokens: Int[Tensor, "*batch seq"]
    targets: Int[Tensor, "*batch seq"]
    weights: Float[Tensor, "*batch seq"]
    segments: Int[Tensor, "*batch seq"] | None = None
    loss_positions: Int[Tensor, " n"] | None = None


@shaped
def nll(params: GPT, batch: Batch, remat: bool = False) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(Σ weight · nll, Σ weight) in nats: sums, so that unequal batches add up exactly. `remat` is that of `hidden`."""
    h = hidden(params, batch.tokens, batch.segments, remat).flatten(0, -2)
    y, weights = batch.targets.flatten(), batch.weights.flatten()
    if batch.loss_positions is not None:
        h, y, weights = h[batch.loss_positions], y[batch.loss_positions], weights[batch.loss_positions]
    each = cross_entropy(linear_terms(h, lm_head(params).w), lm_head(params).b, y)
    weights = weights.to(each.dtype)
    return (weights * each).sum(), weights.sum()


def loss(params: GPT, batch: Batch, remat: bool = False) -> Float[Tensor, ""]:
    """Mean negative log-likelihood in nats per weighted token."""
    total, weight = nll(params, batch, remat)
    return total / weight
