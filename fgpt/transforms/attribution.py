"""Which training rows a loss comes from: predictions of what leaving rows out would change, and their score.

    effect_qi = dL_q(θ_T) / dw_i        how the loss of query q moves with the weight of training row i

`metagradient` computes it through the whole training (MAGIC). The others look at a few points of the path alone:

    TracIn            -Σ_k η_k ∇L_q(θ_k) · ∇ℓ_i(θ_k)
    influence         -∇L_q(θ_T) · (G + λI)⁻¹ ∇ℓ_i(θ_T),  G the curvature of the training loss
    cosine            of the two gradients, at the end: `fgpt.transforms.per_example.gradient_similarity`

A score compares effects with the losses of trainings without some rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from fgpt.errors import InputError
from fgpt.losses import Batch
from fgpt.transforms.laplace import Curvature
from fgpt.transforms.per_example import ExampleLoss, gradient_products, per_example_grads, products_with
from fgpt.tree import tree_map

Tree: TypeAlias = Any


def tracin(
    loss: ExampleLoss,
    points: Sequence[Tree],
    examples: Sequence[Batch],
    queries: Sequence[Batch],
    *,
    lrs: Sequence[float] | None = None,
    query_loss: ExampleLoss | None = None,
    chunk_size: int | None = None,
) -> Float[Tensor, "examples queries"]:
    """By how much steps on each example lower the loss of each query: Σ_k η_k ∇ℓ_i(θ_k) · ∇L_q(θ_k).

    Args:
        loss: The loss of one training example.
        points: θ_k, params along the training, such as those of its checkpoints.
        examples: Batches of one row each.
        queries: The same.
        lrs: η_k, the learning rate at each point. None weighs all points equally.
        query_loss: The loss of one query. None takes `loss`.
        chunk_size: As in `per_example_grads`.

    Raises:
        InputError: if there are no points, examples or queries, or rates of another number.

    Source: Pruthi et al. 2020 (TracIn), section 3.2.

    >>> def loss(params, example):
    ...     return (params["w"] * example.weights).sum()
    >>> def row(*numbers):
    ...     x = torch.tensor([numbers])
    ...     return Batch(x.long(), x.long(), x.float())
    >>> tracin(loss, [{"w": torch.zeros(1, 2)}], [row(1, 0), row(1, 1)], [row(2, 0)], lrs=[0.1])
    tensor([[0.2000],
            [0.2000]])
    """
    rates = [1.0] * len(points) if lrs is None else lrs
    if not points or len(rates) != len(points):
        raise InputError(
            f"{len(points)} points and {len(rates)} learning rates: expected one rate for each, and a point"
        )
    total: Any = 0
    for params, lr in zip(points, rates, strict=True):
        total = total + lr * gradient_products(loss, params, examples, queries, query_loss, chunk_size=chunk_size)
    return total


def influence(
    loss: ExampleLoss,
    params: Tree,
    examples: Sequence[Batch],
    queries: Sequence[Batch],
    curvature: Curvature,
    *,
    damping: float,
    query_loss: ExampleLoss | None = None,
    chunk_size: int | None = None,
) -> Float[Tensor, "examples queries"]:
    """By how much more weight of each example would lower the loss of each query, if the training ended at a minimum:
    ∇ℓ_i · (G + λI)⁻¹ ∇L_q.

    Args:
        loss: The loss of one training example.
        params: θ_T.
        examples: Batches of one row each.
        queries: The same. Their gradients are in memory together.
        curvature: G of the sum of the examples' losses, such as `fgpt.transforms.laplace.kronecker_curvature`.
        damping: λ.
        query_loss: The loss of one query. None takes `loss`.
        chunk_size: As in `per_example_grads`.

    Raises:
        InputError: if there are no examples or queries, or λ is not positive.

    Source: Koh and Liang 2017, "Understanding Black-box Predictions via Influence Functions"; Grosse et al. 2023,
    "Studying Large Language Model Generalization with Influence Functions".

    >>> def loss(params, example):
    ...     return (params["w"] * example.weights).sum()
    >>> def row(*numbers):
    ...     x = torch.tensor([numbers])
    ...     return Batch(x.long(), x.long(), x.float())
    >>> curvature = Curvature({"w": torch.tensor([[3.0, 0.0]])}, lambda x: x, lambda x: x)
    >>> influence(loss, {"w": torch.zeros(1, 2)}, [row(1, 1)], [row(8, 2)], curvature, damping=1.0)  # 8 / 4 + 2 / 1
    tensor([[4.]])
    """
    if not damping > 0:
        raise InputError(f"damping is {damping}: expected a positive number")

    def solve(vector: Tree) -> Tree:
        solution = tree_map(lambda x, h: x / (h + damping), curvature.rotate(vector), curvature.eigenvalues)
        return curvature.rotate_back(solution)

    directions = vmap(solve)(per_example_grads(query_loss or loss, params, queries, chunk_size=chunk_size).grads)
    return products_with(loss, params, examples, directions, chunk_size=chunk_size)


class LDS(NamedTuple):
    """What `lds` returns: rank correlations, 1 at best.

    Args:
        per_query: Of each query.
        aggregate: Of the mean over all queries.
    """

    per_query: Float[Tensor, " queries"]
    aggregate: Float[Tensor, ""]


def lds(
    effects: Float[Tensor, "queries rows"],
    row_weights: Float[Tensor, "subsets rows"],
    losses: Float[Tensor, "subsets queries"],
) -> LDS:
    """The linear datamodeling score: the Spearman correlation, over trainings on subsets of the rows, of the losses
    that the effects predict and the losses that were measured.

    Args:
        effects: How the loss of each query moves with the weight of each row.
        row_weights: The weights of the rows in each training, 0 for those left out.
        losses: The losses of the queries after each training.

    Source: Park et al. 2023 (TRAK), definition 2.3.

    >>> effects = torch.tensor([[-1.0, -0.5, 0.2]])  # the third row hurts the query
    >>> without_one = 1 - torch.eye(3)
    >>> score = lds(effects, without_one, torch.tensor([[3.0], [2.5], [1.8]]))
    >>> round(float(score.per_query), 6)
    1.0
    """
    predicted = row_weights @ effects.T
    return LDS(_spearman(predicted, losses), _spearman(predicted.mean(1)[:, None], losses.mean(1)[:, None])[0])


def _spearman(x: Float[Tensor, "n columns"], y: Float[Tensor, "n columns"]) -> Float[Tensor, " columns"]:
    return torch.cosine_similarity(_centered_ranks(x), _centered_ranks(y), dim=0)


def _centered_ranks(x: Float[Tensor, "n columns"]) -> Float[Tensor, "n columns"]:
    """Ranks less their mean; equal values share the mean of theirs."""
    below, above = (x[:, None] > x).sum(1), (x[:, None] < x).sum(1)
    return (below - above).double() / 2
