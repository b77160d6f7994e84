"""The gradient of each example by itself: its norm, its direction, and how noisy the gradient of a batch is.

    g_i = ∂ℓ(θ, x_i)/∂θ        for all i at the price of about one backward of the sum

Examples are rows of other lengths: they are sorted, and those of about one length computed together, in chunks. A chunk
is mapped over with its own copy of θ each, so that plain autograd, which frees its graph, computes all gradients at
once; under other transforms they are those of `torch.func`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from fgpt.errors import InputError
from fgpt.kernels.precision import at_least_fp32
from fgpt.losses import Batch
from fgpt.sweeps import stack_batches
from fgpt.train_step import value_and_grad_of_member
from fgpt.tree import leaves, num_elements, tree_leaves, tree_map

Tree: TypeAlias = Any
ExampleLoss: TypeAlias = Callable[[Tree, Any], Float[Tensor, ""]]
"""(params, example) -> loss. Padding of weight 0 must not change it, as is so of `fgpt.nll`'s sum. What it closes over
is a constant to plain autograd, as in a training step."""

CHUNK_POSITIONS = 4096
"""Positions, padding included, of the examples that are computed at once. A CPU computes fewer of large params, whose
activations need memory: see `chunk_positions`.
"""
CHUNK_ELEMENTS = 2**28
"""Elements of all gradients that are computed at once, unless one alone has more."""


class PerExample(NamedTuple):
    """What `per_example_grads` returns.

    Args:
        grads: The gradients, of the form of the params with a leading axis of examples.
        losses: The loss of each example.

    >>> PerExample({"w": torch.zeros(3, 2)}, torch.zeros(3)).losses.shape
    torch.Size([3])
    """

    grads: Tree
    losses: Float[Tensor, " n"]


def per_example_grads(
    loss: ExampleLoss, params: Tree, examples: Sequence[Batch], *, chunk_size: int | None = None
) -> PerExample:
    """The gradient of each example.

    Args:
        loss: The loss of one example, such as `lambda adapters, row: fgpt.nll(fgpt.adapt(base, adapters), row)[0]`.
        params: What is differentiated, such as adapters.
        examples: Batches of one row each, of any lengths.
        chunk_size: Examples that are computed at once. None takes those of 4,096 positions, on a CPU of 1,024 or more
            if the params are large, and fewer of very large ones.

    Raises:
        InputError: if there are no examples.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> base = fgpt.init(config, fgpt.key(0))
    >>> rows = [torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6, 7]])]
    >>> examples = [fgpt.Batch(x[:, :-1], x[:, 1:], torch.ones(1, x.shape[1] - 1)) for x in rows]
    >>> adapters = fgpt.lora(base, fgpt.key(1), rank=2)
    >>> result = per_example_grads(lambda a, row: fgpt.nll(fgpt.adapt(base, a), row)[0], adapters, examples)
    >>> result.losses.shape, result.grads["blocks.0.attn.q"].b.shape
    (torch.Size([2]), torch.Size([2, 8, 2]))
    """
    parts = list(grads_in_chunks(loss, params, examples, chunk_size))
    order = torch.tensor([i for indices, _, _ in parts for i in indices]).argsort()
    losses = torch.cat([values for _, _, values in parts])
    grads = tree_map(lambda *xs: torch.cat(xs)[order.to(xs[0].device)], *(grads for _, grads, _ in parts))
    return PerExample(grads, losses[order.to(losses.device)])


def per_example_norms(
    loss: ExampleLoss, params: Tree, examples: Sequence[Batch], *, chunk_size: int | None = None
) -> Float[Tensor, " n"]:
    """The norm of each example's gradient. No more gradients are in memory than those of a chunk.

    Args:
        loss: The loss of one example.
        params: What is differentiated.
        examples: Batches of one row each.
        chunk_size: As in `per_example_grads`.

    Raises:
        InputError: if there are no examples.
    """
    norms: list[tuple[int, Tensor]] = []
    for indices, grads, _ in grads_in_chunks(loss, params, examples, chunk_size):
        norms += zip(indices, square_norms(grads).sqrt(), strict=True)
    return torch.stack([norm for _, norm in sorted(norms, key=lambda pair: pair[0])])


class NoiseScale(NamedTuple):
    """What `gradient_noise_scale` returns.

    Args:
        scale: tr(Σ) / ‖G‖²: the batch size, in examples, from which on a larger one saves fewer steps than it costs.
        signal: ‖G‖², of the gradient of all examples that there could be.
        noise: tr(Σ), the variance of an example's gradient.

    >>> NoiseScale(torch.tensor(2.0), torch.tensor(1.0), torch.tensor(2.0)).scale
    tensor(2.)
    """

    scale: Float[Tensor, ""]
    signal: Float[Tensor, ""]
    noise: Float[Tensor, ""]


def gradient_noise_scale(
    loss: ExampleLoss, params: Tree, examples: Sequence[Batch], *, chunk_size: int | None = None
) -> NoiseScale:
    """The simple noise scale, from unbiased estimates of signal and noise: with the mean gradient ḡ of n examples,

        ‖G‖² = (n ‖ḡ‖² - mean ‖g_i‖²) / (n - 1)        tr(Σ) = (mean ‖g_i‖² - ‖ḡ‖²) n / (n - 1)

    Where there is hardly any signal its estimate may be negative, and the scale with it: take more examples.

    Args:
        loss: The loss of one example.
        params: What is differentiated.
        examples: Two or more batches of one row each.
        chunk_size: As in `per_example_grads`.

    Raises:
        InputError: for fewer than two examples.

    Source: McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", section 2.2 and appendix A.
    """
    if len(examples) < 2:
        raise InputError(f"{len(examples)} examples have no noise scale: expected two or more")
    squares, total = [], None
    for _, grads, _ in grads_in_chunks(loss, params, examples, chunk_size):
        squares.append(square_norms(grads))
        part = tree_map(lambda g: at_least_fp32(g).sum(0), grads)
        total = part if total is None else tree_map(torch.add, total, part)
    return noise_scale_of(total, torch.cat(squares))


def noise_scale_of(total: Tree, squares: Float[Tensor, " n"]) -> NoiseScale:
    """The noise scale of n gradients by their sums, with the equations of `gradient_noise_scale`.

    Args:
        total: Σ g_i, in at least fp32.
        squares: ‖g_i‖² of each of two or more.

    >>> noise_scale_of({"w": torch.tensor([2.0, 1.0])}, torch.tensor([1.0, 2.0])).scale  # of [1, 0] and [1, 1]
    tensor(0.5000)
    """
    n, mean_square = len(squares), squares.mean()
    square_of_mean = torch.stack([(g / n).square().sum() for g in tree_leaves(total)]).sum()
    signal = (n * square_of_mean - mean_square) / (n - 1)
    noise = (mean_square - square_of_mean) * n / (n - 1)
    return NoiseScale(noise / signal, signal, noise)


def gradient_similarity(
    loss: ExampleLoss,
    params: Tree,
    examples: Sequence[Batch],
    queries: Sequence[Batch],
    *,
    chunk_size: int | None = None,
) -> Float[Tensor, "examples queries"]:
    """The cosine of each example's gradient with each query's: which examples a step on would lower the loss of which
    queries. The gradients of all queries are in memory, and those of a chunk of examples.

    Args:
        loss: The loss of one example.
        params: What is differentiated.
        examples: Batches of one row each, such as training rows.
        queries: The same, such as rows of a task that the training is to serve.
        chunk_size: As in `per_example_grads`.

    Raises:
        InputError: if there are no examples or no queries.

    Source: Xia et al. 2024 (LESS), section 4, without Adam's moments and random projections.

    >>> def loss(params, example):
    ...     return (params["w"] * example.weights).sum()
    >>> def row(*numbers):
    ...     x = torch.tensor([numbers])
    ...     return Batch(x.long(), x.long(), x.float())
    >>> gradient_similarity(loss, {"w": torch.zeros(1, 2)}, [row(1, 0), row(1, 1)], [row(2, 0)])
    tensor([[1.0000],
            [0.7071]])
    """
    return _products(loss, params, examples, queries, loss, chunk_size, _directions)


def gradient_products(
    loss: ExampleLoss,
    params: Tree,
    examples: Sequence[Batch],
    queries: Sequence[Batch],
    query_loss: ExampleLoss | None = None,
    *,
    chunk_size: int | None = None,
) -> Float[Tensor, "examples queries"]:
    """The inner product of each example's gradient with each query's, in memory as in `gradient_similarity`.

    Args:
        loss: The loss of one example.
        params: What is differentiated.
        examples: Batches of one row each.
        queries: The same.
        query_loss: The loss of one query. None takes `loss`.
        chunk_size: As in `per_example_grads`.

    Raises:
        InputError: if there are no examples or no queries.
    """
    return _products(loss, params, examples, queries, query_loss or loss, chunk_size, _vectors)


def products_with(
    loss: ExampleLoss, params: Tree, examples: Sequence[Batch], vectors: Tree, *, chunk_size: int | None = None
) -> Float[Tensor, "examples vectors"]:
    """The inner product of each example's gradient with each of some vectors. The vectors are in memory, and the
    gradients of a chunk.

    Args:
        loss: The loss of one example.
        params: What is differentiated.
        examples: Batches of one row each.
        vectors: Of the form of the params, with a leading axis.
        chunk_size: As in `per_example_grads`.

    Raises:
        InputError: if there are no examples.
    """
    return _rows_of_products(loss, params, examples, _vectors(vectors), chunk_size, _vectors)


def _products(
    loss: ExampleLoss,
    params: Tree,
    examples: Sequence[Batch],
    queries: Sequence[Batch],
    query_loss: ExampleLoss,
    chunk_size: int | None,
    vectors: Callable[[Tree], Float[Tensor, "n elements"]],
) -> Float[Tensor, "examples queries"]:
    """Inner products of the gradients as `vectors` makes them."""
    targets = vectors(per_example_grads(query_loss, params, queries, chunk_size=chunk_size).grads)
    return _rows_of_products(loss, params, examples, targets, chunk_size, vectors)


def _rows_of_products(
    loss: ExampleLoss,
    params: Tree,
    examples: Sequence[Batch],
    targets: Float[Tensor, "n elements"],
    chunk_size: int | None,
    vectors: Callable[[Tree], Float[Tensor, "n elements"]],
) -> Float[Tensor, "examples n"]:
    rows: list[tuple[int, Tensor]] = []
    for indices, grads, _ in grads_in_chunks(loss, params, examples, chunk_size):
        rows += zip(indices, vectors(grads) @ targets.T, strict=True)
    return torch.stack([row for _, row in sorted(rows, key=lambda pair: pair[0])])


def grads_in_chunks(
    loss: ExampleLoss,
    params: Tree,
    examples: Sequence[Batch],
    chunk_size: int | None = None,
    *,
    max_positions: int = CHUNK_POSITIONS,
) -> Iterator[tuple[list[int], Tree, Float[Tensor, " n"]]]:
    """Indices of examples of about one length, their gradients and their losses.

    Args:
        loss: The loss of one example.
        params: What is differentiated.
        examples: Batches of one row each.
        chunk_size: As in `per_example_grads`.
        max_positions: The most positions that are computed at once, if one example has not more.

    Raises:
        InputError: if there are no examples.
    """

    def with_aux(tree: Tree, example: Any) -> tuple[Tensor, Tensor]:
        value = loss(tree, example)
        return value, value.detach()

    size = num_elements(params)
    max_rows = CHUNK_ELEMENTS // max(1, size)
    for indices, stacked in stacked_chunks(examples, size, max_rows, chunk_size, max_positions=max_positions):
        n = len(indices)
        copies = tree_map(lambda x, n=n: x.expand(n, *x.shape), params)
        grads, (losses, _) = vmap(lambda t, e: value_and_grad_of_member(with_aux, t, e))(copies, stacked)
        yield indices, grads, losses


def stacked_chunks(
    examples: Sequence[Batch],
    size: int,
    max_rows: int,
    chunk_size: int | None = None,
    *,
    max_positions: int = CHUNK_POSITIONS,
) -> Iterator[tuple[list[int], Batch]]:
    """Indices of examples of about one length, and these with a leading axis, filled up to one length.

    Args:
        examples: Batches of one row each.
        size: Elements of what is differentiated.
        max_rows: The most examples in a chunk, if that is 1 or more.
        chunk_size: Examples in a chunk, instead of what these numbers and the device say.
        max_positions: The most positions in a chunk, if one example has not more.

    Raises:
        InputError: if there are no examples, or for a `chunk_size` below 1.
    """
    if not examples:
        raise InputError("there are no examples: expected one batch of one row or more")
    if chunk_size is not None and chunk_size < 1:
        raise InputError(f"chunk_size is {chunk_size}: expected 1 or more")
    positions = min(max_positions, chunk_positions(size, examples[0].tokens.device))
    widths = [example.tokens.shape[-1] for example in examples]
    for indices in chunks_by_width(widths, positions, chunk_size, max(1, max_rows)):
        (stacked,) = stack_batches([[examples[i]] for i in indices])
        yield indices, stacked


def chunk_positions(size: int, at: torch.device) -> int:
    """How many positions are computed at once. On a CPU the calls of a chunk take as long as some 150 positions of
    `nano`: of a small model many positions are needed to hide them, of a large one few.

    Args:
        size: Elements of what is differentiated, which grow with the model.
        at: The device.

    >>> chunk_positions(147_456, torch.device("cpu"))  # a LoRA of rank 8 on nano
    3640
    >>> chunk_positions(2_440_000, torch.device("cpu"))  # on SmolLM2-135M
    1024
    """
    return CHUNK_POSITIONS if at.type != "cpu" else min(CHUNK_POSITIONS, max(1024, 2**29 // max(1, size)))


def chunks_by_width(
    widths: Sequence[int], most: int, chunk_size: int | None = None, max_rows: int | None = None
) -> Iterator[list[int]]:
    """The indices of rows of about one width, the widest first: `chunk_size` of them, or so many that they have at most
    `most` positions once they are filled up to one width, and at most `max_rows`.

    >>> list(chunks_by_width([3, 9, 4], most=10))
    [[1], [2, 0]]
    """
    order = sorted(range(len(widths)), key=widths.__getitem__, reverse=True)
    while order:
        count = chunk_size or min(max(1, most // max(1, widths[order[0]])), max_rows or len(order))
        yield order[:count]
        order = order[count:]


def square_norms(grads: Tree) -> Float[Tensor, " n"]:
    """Of each example, over all leaves."""
    return torch.stack([at_least_fp32(g).flatten(1).square().sum(1) for g in tree_leaves(grads)]).sum(0)


def _directions(grads: Tree) -> Float[Tensor, "n elements"]:
    """Each example's gradient as a unit vector; zeros stay zero."""
    flat = _vectors(grads)
    return flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-30)


def _vectors(grads: Tree) -> Float[Tensor, "n elements"]:
    """Each example's gradient as one vector."""
    return torch.cat([at_least_fp32(g).flatten(1) for g in leaves(grads).values()], 1)
