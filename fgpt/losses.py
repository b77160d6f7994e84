"""Batches, and the loss of a model on one."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from fgpt._typing import check_shapes
from fgpt.errors import InputError
from fgpt.kernels.cross_entropy import cross_entropy
from fgpt.kernels.functorch_state import is_mapped
from fgpt.model import GPT, SharedPrompts, hidden, hidden_after, hidden_at, lm_head, read_prompts
from fgpt.tree import node
from fgpt.weights import Adapted, Weight, dense, lora_down


@node
class Batch:
    """Tokens, and which of them the loss is about.

    Args:
        tokens: Token ids.
        targets: The token to predict at each position, that is the text's next token.
        weights: The weight of each position in the loss; 0 leaves it out.
        segments: The document that each position belongs to, 0 for padding. None if each row is one document, padded on
            the right at most: the causal mask alone then keeps padding out.
        loss_positions: The flat positions with a weight, and any others, each once, which is checked on a CPU: logits,
            and all of the last block but its keys and values, are computed only there. None computes them at all
            positions, which suits vmap over examples and training on whole texts.
        cu_seqlens: Where each document of a row begins and the last one ends, padding being a document: segments for
            attention without a mask. Rows with fewer documents repeat their length. None: as `segments` say.

    >>> import fgpt, torch
    >>> text = torch.tensor([[1, 2, 3, 4]])
    >>> fgpt.Batch(text[:, :-1], text[:, 1:], torch.ones(1, 3)).targets
    tensor([[2, 3, 4]])
    """

    tokens: Int[Tensor, "*batch seq"]
    targets: Int[Tensor, "*batch seq"]
    weights: Float[Tensor, "*batch seq"]
    segments: Int[Tensor, "*batch seq"] | None = None
    loss_positions: Int[Tensor, " n"] | None = None
    cu_seqlens: Int[Tensor, "*batch documents"] | None = None


def text_positions(batch: Batch) -> Bool[Tensor, "*batch seq"]:
    """Which positions are text and not padding. Without segments each row ends at its last weighted token.

    >>> import fgpt, torch
    >>> text = torch.tensor([[1, 2, 3, 0]])
    >>> text_positions(fgpt.Batch(text, text, weights=torch.tensor([[0.0, 0.0, 1.0, 0.0]])))
    tensor([[ True,  True,  True, False]])
    """
    if batch.segments is not None:
        return batch.segments > 0
    return (batch.weights != 0).flip(-1).cumsum(-1).flip(-1) > 0


def pad_loss_positions(batches: Sequence[Batch], parts: int = 8) -> list[Batch]:
    """The same batches, with positions of weight 0 added to their `loss_positions`: so many that their number is a
    multiple of a `parts`th of all positions, and the same share in each batch. Few shapes arise, for CUDA graphs, and
    logits are computed at up to a `parts`th of the positions more.

    Args:
        batches: The micro-batches of a step. One without `loss_positions` stays as it is.
        parts: How many numbers of positions there can be, besides 0.

    >>> import fgpt, torch
    >>> weights = torch.tensor([[0.0, 0, 1, 0, 1, 1, 0, 0]])
    >>> text = torch.zeros(1, 8, dtype=torch.int64)
    >>> batch = Batch(text, text, weights, loss_positions=torch.tensor([2, 4, 5]))
    >>> pad_loss_positions([batch], parts=2)[0].loss_positions
    tensor([0, 2, 4, 5])
    """
    most = 0
    for batch in batches:
        if batch.loss_positions is not None:
            most = max(most, -(-parts * len(batch.loss_positions) // batch.weights.numel()))
    return [with_num_positions(batch, -(-most * batch.weights.numel() // parts)) for batch in batches]


def with_num_positions(batch: Batch, number: int) -> Batch:
    """The batch with so many `loss_positions`. Those that are added have weight 0 and target 0, which is an id of any
    head: of a classifier all others may be too high.
    """
    positions = batch.loss_positions
    if positions is None:
        return batch
    is_free = torch.ones(batch.weights.numel(), dtype=torch.bool, device=positions.device)
    is_free = is_free.index_fill(0, positions, False)
    others = is_free.nonzero().flatten()[: number - len(positions)]
    targets = batch.targets.flatten().index_fill(0, others, 0).view_as(batch.targets)
    return replace(batch, targets=targets, loss_positions=torch.cat([positions, others]).sort().values)


def at_all_positions(batch: Batch) -> Batch:
    """The batch with its loss computed at all positions. Targets of weight 0 become 0, as in `with_num_positions`."""
    targets = torch.where(batch.weights == 0, 0, batch.targets)
    return replace(batch, targets=targets, loss_positions=None)


@check_shapes
def nll(
    params: GPT, batch: Batch, remat: bool = False, compile: bool = False, *, per_example: bool = False
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """(Σ weight · nll, Σ weight) in nats: sums, so that batches of any sizes add up exactly.

    Args:
        params: The model, adapted or not.
        batch: Tokens, targets and the weight of each target.
        remat: Activation checkpointing, see `hidden`.
        compile: Compile the transformer block, see `hidden`.
        per_example: Both sums of each row of the batch by itself, in place of all: of one example, or of all that are
            packed into the row.

    Raises:
        InputError: if a row is longer than the context.

    >>> import fgpt, torch
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params = fgpt.init(config, fgpt.key(0))
    >>> text = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]])
    >>> batch = fgpt.Batch(text[:, :-1], text[:, 1:], torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]))
    >>> fgpt.nll(params, batch)[1], fgpt.nll(params, batch, per_example=True)[1]
    (tensor(3.), tensor([2., 1.]))
    """
    losses, weights = token_nll(params, batch, remat, compile)
    if per_example:
        return _row_sums(weights * losses, batch), _row_sums(weights, batch)
    return (weights * losses).sum(), weights.sum()


def _row_sums(values: Float[Tensor, " n"], batch: Batch) -> Float[Tensor, "*batch"]:
    """The sum over each row of the batch, of values where `at_loss` has them."""
    *rows, seq = batch.tokens.shape
    if batch.loss_positions is None:
        return values.view(*rows, seq).sum(-1)
    return values.new_zeros(math.prod(rows)).index_add(0, batch.loss_positions // seq, values).view(rows)


def token_nll(
    params: GPT, batch: Batch, remat: bool = False, compile: bool = False, prompts: SharedPrompts | None = None
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """The nll of each target in nats, and its weight: of the batch's `loss_positions`, or of all positions, flat.

    Args:
        params: The model, adapted or not.
        batch: Tokens, targets and the weight of each target.
        remat: Activation checkpointing, see `hidden`.
        compile: Compile the transformer block, see `hidden`.
        prompts: What the rows of the batch continue; None if they are whole.

    Raises:
        InputError: for prompts and `compile`: a compiled block keeps no keys and values.
    """
    h = loss_hidden(params, batch, remat, compile, prompts)
    losses = cross_entropy(linear_terms(h, lm_head(params).w), lm_head(params).b, at_loss(batch.targets, batch))
    return losses, at_loss(batch.weights, batch).to(losses.dtype)


def loss_hidden(
    params: GPT, batch: Batch, remat: bool = False, compile: bool = False, prompts: SharedPrompts | None = None
) -> Float[Tensor, "n d_model"]:
    """The hidden states from which a loss is computed: at the batch's `loss_positions`, or at all positions, flat.

    Args:
        params: The model, adapted or not.
        batch: Tokens, and where the loss is.
        remat: Activation checkpointing, see `hidden`.
        compile: Compile the transformer block, see `hidden`.
        prompts: As in `token_nll`.
    """
    positions = batch.loss_positions
    if prompts is not None:
        if compile:
            raise InputError(
                "the compiled block reads no shared prompts: expected rows that have their prompts in them"
            )
        if positions is not None:
            _check_distinct(positions)
        cache = read_prompts(params, prompts, remat)
        h = hidden_after(params, cache, prompts.prompt_of_row, batch.tokens, positions, remat)
        return h.view(-1, params.cfg.d_model)
    if positions is None:
        return hidden(params, batch.tokens, batch.segments, remat, compile, batch.cu_seqlens).flatten(0, -2)
    _check_distinct(positions)
    return hidden_at(params, batch.tokens, positions, batch.segments, remat, compile, batch.cu_seqlens)


def _check_distinct(positions: Int[Tensor, " n"]) -> None:
    """Raises InputError if a position comes twice, whose queries would have the gradient of both for each. On a CPU
    alone, as on a GPU one would wait for it, and not if vmap maps them.
    """
    if torch.compiler.is_compiling() or positions.device.type != "cpu" or is_mapped(positions):
        return
    if (positions.diff() > 0).all():
        return
    in_order = positions.sort().values
    repeated = in_order[1:][in_order.diff() == 0]
    if len(repeated):
        raise InputError(
            f"expected distinct loss_positions, got {int(repeated[0])} twice: give it once, with the sum of its weights"
        )


def at_loss(values: Shaped[Tensor, "*batch seq"], batch: Batch) -> Shaped[Tensor, " n"]:
    """Targets or weights of a batch where `loss_hidden` has states."""
    flat = values.flatten()
    return flat if batch.loss_positions is None else flat.index_select(0, batch.loss_positions)


def linear_terms(x: Float[Tensor, "*batch in"], w: Weight) -> list[tuple[Tensor, Tensor]]:
    """`linear` as terms of a sum, the base first: pairs (x_j, W_j) with x dense(w)ᵀ = Σ_j x_j W_jᵀ. A quantized weight
    is dequantized, and the factors of rows are multiplied into each W_j: an update may have dropout of its own input.
    """
    if isinstance(w, Tensor):
        return [(x, w)]
    if not isinstance(w, Adapted):
        return [(x, dense(w).to(x.dtype))]
    x = x if w.col is None else x * w.col.to(x.dtype)
    terms = linear_terms(x, w.base)
    if w.a is not None and w.b is not None:
        terms = [*terms, (lora_down(x, w), w.b)]
    row = w.row
    return [(y, (m if row is None else row[:, None] * m).to(x.dtype)) for y, m in terms]


def loss(params: GPT, batch: Batch, remat: bool = False) -> Float[Tensor, ""]:
    """Mean negative log-likelihood, in nats per token, each token weighted: the quotient of what `nll` returns.

    Args:
        params: The model, adapted or not.
        batch: Tokens, targets and the weight of each target.
        remat: Activation checkpointing, see `hidden`.

    Raises:
        InputError: if a row is longer than the context.

    >>> import fgpt, math, torch
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> text = torch.tensor([[1, 2, 3, 4]])
    >>> batch = fgpt.Batch(text[:, :-1], text[:, 1:], torch.ones(1, 3))
    >>> value = fgpt.loss(fgpt.init(config, fgpt.key(0)), batch)
    >>> abs(float(value) - math.log(11)) < 0.1  # an untrained model gives each of 11 tokens about the same probability
    True
    """
    total, weight = nll(params, batch, remat)
    return total / weight
