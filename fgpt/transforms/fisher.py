"""Fisher matrices of a model that predicts classes, such as the next token.

    F = Σ_i w_i E[∇ log p_i(y) ∇ log p_i(y)ᵀ], y ~ p_i    the Fisher information: labels of the model itself
      = Σ_i w_i J_iᵀ (diag(p_i) - p_i p_iᵀ) J_i            the Gauss-Newton matrix of Σ_i w_i nll_i
    F̂ = 1/n Σ_i g_i g_iᵀ                                   the empirical Fisher: labels of the data

p_i is the distribution at position i given the tokens before it, J_i the Jacobian of its logits, g_i the gradient of an
example's loss. Products with F are those of `ggn_operator` with a cross-entropy. F̂ is no estimate of it: the two agree
where the model has the distribution of the data, and elsewhere F̂ is large where the loss is.

Source: Martens 2020, "New Insights and Perspectives on the Natural Gradient Method", sections 9 and 11; Kunstner et al.
2019, "Limitations of the Empirical Fisher Approximation", section 3.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp

from fgpt.errors import InputError
from fgpt.kernels.precision import at_least_fp32
from fgpt.losses import Batch
from fgpt.rng import fold_in
from fgpt.transforms.curvature import Operator, Outputs, Tree, in_form_of
from fgpt.transforms.per_example import ExampleLoss, grads_in_chunks, per_example_grads
from fgpt.tree import tree_leaves, tree_map


def empirical_fisher_operator(
    loss: ExampleLoss, params: Tree, examples: Sequence[Batch], *, chunk_size: int | None = None
) -> Operator:
    """v -> F̂ v at a point, for many v. The gradients of all examples stay in memory as long as the operator does.

    Args:
        loss: The loss of one example, as in `per_example_grads`.
        params: θ.
        examples: Batches of one row each, of any lengths.
        chunk_size: Examples that are computed at once, as in `per_example_grads`.

    Raises:
        InputError: if there are no examples; and from the operator, for a vector of another form.

    >>> def loss(params, example):
    ...     return (params["w"] * example.weights).sum()
    >>> def row(*numbers):
    ...     x = torch.tensor([numbers])
    ...     return Batch(x.long(), x.long(), x.float())
    >>> params = {"w": torch.ones(1, 2)}
    >>> empirical_fisher_operator(loss, params, [row(1, 0), row(1, 2)])(params)  # (1·(1, 0) + 3·(1, 2)) / 2
    {'w': tensor([[2., 3.]])}
    """
    grads = per_example_grads(loss, params, examples, chunk_size=chunk_size).grads

    def multiply(vector: Tree) -> Tree:
        pairs = zip(tree_leaves(grads), tree_leaves(in_form_of(params, vector)), strict=True)
        products = torch.stack([g.flatten(1) @ v.flatten() for g, v in pairs]).sum(0)
        return tree_map(lambda g: torch.tensordot(products.to(g.dtype) / len(g), g, 1), grads)

    return multiply


def empirical_fisher_diagonal(
    loss: ExampleLoss, params: Tree, examples: Sequence[Batch], *, chunk_size: int | None = None
) -> Tree:
    """The diagonal of F̂: the mean square of each element of the gradient. No more gradients are in memory than those of
    a chunk.

    Args:
        loss: The loss of one example, as in `per_example_grads`.
        params: θ.
        examples: Batches of one row each, of any lengths.
        chunk_size: Examples that are computed at once, as in `per_example_grads`.

    Raises:
        InputError: if there are no examples.

    >>> def loss(params, example):
    ...     return (params["w"] * example.weights).sum()
    >>> def row(*numbers):
    ...     x = torch.tensor([numbers])
    ...     return Batch(x.long(), x.long(), x.float())
    >>> empirical_fisher_diagonal(loss, {"w": torch.ones(1, 2)}, [row(1, 0), row(1, 2)])
    {'w': tensor([[1., 2.]])}
    """
    total = tree_map(lambda x: torch.zeros_like(at_least_fp32(x)), params)
    for _, grads, _ in grads_in_chunks(loss, params, examples, chunk_size):
        total = tree_map(lambda t, g: t + at_least_fp32(g).square().sum(0), total, grads)
    return tree_map(lambda t: t / len(examples), total)


def fisher_diagonal(
    logits: Outputs,
    params: Tree,
    rng: torch.Generator,
    *,
    weights: Float[Tensor, " n"] | None = None,
    num_samples: int = 32,
) -> Tree:
    """An estimate of the diagonal of F, the mean square of Jᵀ u over random u of `fisher_sample`: unbiased, never
    negative, and of a relative standard error of at most √(2 / num_samples) in each element.

    A sample costs one backward pass of all positions together. The diagonals of several batches add up.

    Args:
        logits: The logits of all positions, a function of the params.
        params: θ.
        rng: A key: sample k is drawn from fold_in(rng, k).
        weights: w, the weight of each position; None is 1 each.
        num_samples: Samples that are averaged.

    Raises:
        InputError: for a `num_samples` below 1.

    Source: Martens et al. 2012, "Estimating the Hessian by Back-propagating Curvature", of the Gauss-Newton matrix.

    >>> from fgpt.rng import key
    >>> def logits(params):  # of two classes, both of probability 1/2: F is 1/4 in each logit
    ...     return torch.stack([params["x"], torch.zeros(())])[None]
    >>> diagonal = fisher_diagonal(logits, {"x": torch.tensor(0.0)}, key(0), num_samples=2000)
    >>> bool((diagonal["x"] - 0.25).abs() < 0.02)
    True
    """
    if num_samples < 1:
        raise InputError(f"num_samples is {num_samples}: expected 1 or more")
    z, pull_back = vjp(logits, params)[:2]
    total = tree_map(lambda x: torch.zeros_like(at_least_fp32(x)), params)
    for k in range(num_samples):
        (sample,) = pull_back(fisher_sample(z, fold_in(rng, k), weights))
        total = tree_map(lambda t, g: t + at_least_fp32(g).square(), total, sample)
    return tree_map(lambda t: t / num_samples, total)


def fisher_sample(
    logits: Float[Tensor, "n classes"], rng: torch.Generator, weights: Float[Tensor, " n"] | None = None
) -> Float[Tensor, "n classes"]:
    """Random u of mean 0 whose covariance is the Fisher information in the logits: w_i (diag(p_i) - p_i p_iᵀ) at
    position i, and 0 between positions. The gradient of Σ u · logits then has the covariance F.

        u_i = √w_i (√p_i ⊙ r - p_i (√p_i · r)),   r = ±1

    Args:
        logits: The logits of each position.
        rng: A key, which draws r.
        weights: w; None is 1 each.

    >>> from fgpt.rng import key
    >>> fisher_sample(torch.zeros(1, 2), key(0)).abs()  # ±(1/2, -1/2) · √2, or 0
    tensor([[0.7071, 0.7071]])
    """
    p = at_least_fp32(logits).softmax(-1)
    signs = 2 * torch.randint(2, p.shape, generator=fold_in(rng, "signs"), device=rng.device).to(p) - 1
    sample = p.sqrt() * signs - p * (p.sqrt() * signs).sum(-1, keepdim=True)
    if weights is not None:
        sample = weights.sqrt()[:, None] * sample
    return sample.to(logits.dtype)
