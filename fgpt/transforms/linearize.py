"""A model as its first-order expansion in the params, and the kernel of that linear model.

    f_lin(θ, x) = f(θ₀, x) + J(θ₀, x) (θ - θ₀),   J = ∂f/∂θ        the tangent model
    K_ij = J(θ₀, x_i) J(θ₀, x_j)ᵀ                                  the empirical neural tangent kernel

θ is a tree of tensors, such as adapters over a frozen base of any format. f_lin is linear in θ: its derivative is J at
every θ, the sum of several trained changes of θ changes the outputs by the sum of theirs, and a training on a squared
error is the kernel regression with K.

At a fresh LoRA B = 0, so that J is 0 in all elements of A: W + s·B·A becomes W + s·ΔB·A₀, and A neither moves in a
training of f_lin nor counts in K. Take another θ₀, such as a LoRA after a few steps, to have it count.

What a model treats as a constant is one in J: the row norms of DoRA, and the rounding of inputs by an int8 base. There
f_lin(θ₀) is f(θ₀) up to a step of that rounding, which the last bit of an input decides.

Source: Jacot et al. 2018, "Neural Tangent Kernel", section 4; Ortiz-Jimenez et al. 2023, "Task Arithmetic in the
Tangent Space", section 4.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp

from fgpt.errors import InputError
from fgpt.kernels.precision import at_least_fp32
from fgpt.losses import Batch
from fgpt.transforms.curvature import Operator, Outputs, in_form_of, jacobian_operators
from fgpt.transforms.per_example import ExampleLoss, per_example_grads
from fgpt.tree import tree_leaves, tree_map

Tree: TypeAlias = Any


def tangent_model(fn: Callable[..., Tree], origin: Tree) -> Callable[..., Tree]:
    r"""f_lin(θ, *args) = f(θ₀, *args) + J(θ₀, *args) (θ - θ₀): one forward pass with its derivative along θ - θ₀.

    It is a function as `fn` is: a loss of its outputs is trained by `make_step`, and it may be mapped over and
    differentiated. A loss is no longer that of a model's params: compute it from the outputs.

    Args:
        fn: f(θ, *args), a tree of tensors, such as `lambda adapters, tokens: fgpt.apply(fgpt.adapt(base, adapters),
            tokens)`.
        origin: θ₀, a tree of floating-point tensors. At a fresh LoRA J is 0 in all elements of A.

    Raises:
        InputError: from the function that it returns, for params of another form than `origin`.

    Source: Ortiz-Jimenez et al. 2023, equation 4; Liu et al. 2023, "TMC: Tangent Model Composition", section 3.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> base, text = fgpt.init(config, fgpt.key(0)), torch.tensor([1, 2, 3])
    >>> def logits(adapters, tokens):
    ...     return fgpt.apply(fgpt.adapt(base, adapters), tokens)
    >>> origin = fgpt.trainable_leaves(base, r"blocks\..*\.w")
    >>> linear_logits = tangent_model(logits, origin)
    >>> near, far = ({path: (1 + s) * x for path, x in origin.items()} for s in (1, 2))
    >>> at_origin, at_near, at_far = (linear_logits(x, text) for x in (origin, near, far))
    >>> torch.allclose(at_origin, logits(origin, text), atol=1e-6)
    True
    >>> torch.allclose(at_far - at_origin, 2 * (at_near - at_origin), atol=1e-5)  # on one line
    True
    >>> torch.allclose(logits(far, text) - at_origin, 2 * (logits(near, text) - at_origin), atol=1e-5)
    False
    """

    def linear_fn(params: Tree, *args: Any) -> Tree:
        change = tree_map(torch.sub, in_form_of(origin, params), origin)
        outputs, tangents = jvp(lambda theta: fn(theta, *args), (origin,), (change,))[:2]
        return tree_map(torch.add, outputs, tangents)

    return linear_fn


def empirical_ntk(
    fn: ExampleLoss,
    params: Tree,
    examples: Sequence[Batch],
    *,
    block_size: int | None = None,
    chunk_size: int | None = None,
) -> Float[Tensor, "n n"]:
    """K_ij = ∇f(θ, x_i) · ∇f(θ, x_j) of a scalar function of each example, from the gradients of all examples.

    For other examples on one side take `fgpt.transforms.per_example.gradient_products`; for several outputs of an
    example `ntk_operator`.

    Args:
        fn: f, a scalar of one example: its loss, or the logit of one token less that of another.
        params: θ, such as adapters.
        examples: Batches of one row each, of any lengths. Padding of weight 0 must not change f.
        block_size: Examples whose gradients are in memory at once, twice: with b blocks each gradient is computed up
            to b times. None keeps all.
        chunk_size: Examples whose gradients are computed at once, as in `per_example_grads`.

    Raises:
        InputError: if there are no examples, or a size is below 1.

    Source: Jacot et al. 2018, section 4; Malladi et al. 2023, "A Kernel-Based View of Language Model Fine-Tuning",
    section 3.

    >>> def loss(params, example):
    ...     return (params["w"] * example.weights).sum()
    >>> def row(*numbers):
    ...     x = torch.tensor([numbers])
    ...     return Batch(x.long(), x.long(), x.float())
    >>> empirical_ntk(loss, {"w": torch.zeros(1, 2)}, [row(1, 0), row(1, 1), row(0, 3)])
    tensor([[1., 1., 0.],
            [1., 2., 3.],
            [0., 3., 9.]])
    """
    if block_size is not None and block_size < 1:
        raise InputError(f"block_size is {block_size}: expected 1 or more")

    def grads(block: Sequence[Batch]) -> Tree:
        return per_example_grads(fn, params, block, chunk_size=chunk_size).grads

    size = block_size or max(1, len(examples))
    blocks = [examples[start : start + size] for start in range(0, len(examples), size)] or [examples]
    kernel: dict[tuple[int, int], Tensor] = {}
    for i, block in enumerate(blocks):
        rows = grads(block)
        for j in range(i, len(blocks)):
            kernel[i, j] = _inner_products(rows, rows if i == j else grads(blocks[j]))
            kernel[j, i] = kernel[i, j].T
    indices = range(len(blocks))
    return torch.cat([torch.cat([kernel[i, j] for j in indices], 1) for i in indices])


def _inner_products(first: Tree, second: Tree) -> Float[Tensor, "n m"]:
    """Of gradients with a leading axis, over all leaves."""
    products = [
        at_least_fp32(x).flatten(1) @ at_least_fp32(y).flatten(1).T
        for x, y in zip(tree_leaves(first), tree_leaves(second), strict=True)
    ]
    return torch.stack(products).sum(0)


def ntk_operator(outputs: Outputs, params: Tree) -> Operator:
    """v -> K v = J Jᵀ v at a point, with v of the form of the outputs: one vector-Jacobian product and one
    Jacobian-vector product, and no gradient of a single output. Their graphs stay in memory as long as the operator.

    `fgpt.transforms.curvature.to_matrix(operator, like=outputs(params))` is K itself for a few outputs, and
    `fgpt.transforms.spectrum` has its eigenvalues for many. With n examples of o outputs each, the trace NTK has the
    traces of its blocks, `torch.einsum("iojo->ij", K.view(n, o, n, o))`.

    Args:
        outputs: z, a function of the params: a tensor, such as the logits of a few tokens at the last position of
            several examples.
        params: θ.

    Raises:
        InputError: from the operator, for a vector of another form than the outputs.

    Source: Jacot et al. 2018, section 4; Novak et al. 2022, "Fast Finite Width Neural Tangent Kernel", section 3.2.

    >>> operator = ntk_operator(lambda p: p["w"] * torch.tensor([2.0, 3.0]), {"w": torch.tensor([1.0, 1.0])})
    >>> operator(torch.tensor([1.0, 1.0]))
    tensor([4., 9.])
    """
    z, push_forward, pull_back = jacobian_operators(outputs, params)

    def multiply(vector: Tensor) -> Tensor:
        return push_forward(pull_back(in_form_of(z, vector)))

    return multiply
