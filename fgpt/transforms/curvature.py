"""Products with the curvature of a loss, a matrix that is never formed, and the matrix itself where it is small.

    H = ∂²L/∂θ²                             the Hessian
    G = Jᵀ (∂²ℓ/∂z²) J,  J = ∂z/∂θ          the generalized Gauss-Newton matrix of L = ℓ ∘ z

θ is a tree of tensors, such as adapters over a frozen base of any format. G is H without the curvature of the outputs
z; if ℓ is convex, G has no negative eigenvalue. If ℓ is the cross-entropy of logits z, G is the Fisher information of
the predicted distributions: see `fgpt.transforms.fisher`.

`hvp` and `ggnvp` are one product each. An operator is made at a point and used for many products: it records the graph
of the gradient once, and as H is symmetric, H v is the vector-Jacobian product of the gradient. Nothing of the point is
computed again: a product takes 0.2 to 0.4 of the time of `hvp`.

What a loss treats as a constant is one here: the row norms of DoRA, and the rounding of inputs by an int8 base, whose
derivatives are those of the matrix without it. On a CPU with bf16 matmuls an int8 base rounds the derivatives too, to
about three digits.

Source: Pearlmutter 1994, "Fast Exact Multiplication by the Hessian"; Schraudolph 2002, "Fast Curvature Matrix-Vector
Products for Second-Order Gradient Descent", sections 3 and 4; Martens 2020, "New Insights and Perspectives on the
Natural Gradient Method", sections 8.1 and 9.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

from fgpt.errors import InputError
from fgpt.tree import leaves, ravel, tree_map

Tree: TypeAlias = Any
Loss: TypeAlias = Callable[[Tree], Float[Tensor, ""]]
"""params -> loss, such as `lambda adapters: fgpt.loss(fgpt.adapt(base, adapters), batch)`."""
Outputs: TypeAlias = Callable[[Tree], Float[Tensor, "..."]]
"""params -> outputs, such as logits [n vocab]."""
OutputLoss: TypeAlias = Callable[[Float[Tensor, "..."]], Float[Tensor, ""]]
"""outputs -> loss, such as `lambda logits: F.cross_entropy(logits, targets)`."""
Operator: TypeAlias = Callable[[Tree], Tree]
"""A symmetric matrix as the function that multiplies a tree, or a tensor, with it. vmap maps it over several."""

CHUNK = 16
"""Columns of a matrix that are computed at once."""


# ------------------------------------------------------------------------------------------------------------- Hessian


def hvp(loss: Loss, params: Tree, vector: Tree) -> Tree:
    """H v, the derivative of the gradient along v. It may be mapped over and differentiated.

    Args:
        loss: A function of the params.
        params: θ.
        vector: v, of the form of the params.

    Raises:
        InputError: if `vector` is not of the form of the params, or `loss` does not return a scalar.

    Source: Pearlmutter 1994, section 3.

    >>> def loss(params):
    ...     return params["x"] ** 2 * params["y"]
    >>> one, zero = torch.tensor(1.0), torch.tensor(0.0)
    >>> hvp(loss, {"x": torch.tensor(3.0), "y": torch.tensor(5.0)}, {"x": one, "y": zero})
    {'x': tensor(10.), 'y': tensor(6.)}
    """
    return jvp(grad(_scalar(loss)), (params,), (in_form_of(params, vector),))[1]


def hessian_operator(loss: Loss, params: Tree) -> Operator:
    """v -> H v at a point, for many v. The graph of the gradient stays in memory as long as the operator does.

    Args:
        loss: A function of the params.
        params: θ.

    Raises:
        InputError: if `loss` does not return a scalar; and from the operator, for a vector of another form.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> base, text = fgpt.init(config, fgpt.key(0)), torch.tensor([[1, 2, 3, 4]])
    >>> batch = fgpt.Batch(text[:, :-1], text[:, 1:], torch.ones(1, 3))
    >>> adapters = fgpt.lora(base, fgpt.key(1), rank=2)
    >>> operator = hessian_operator(lambda a: fgpt.loss(fgpt.adapt(base, a), batch), adapters)
    >>> operator(adapters)["blocks.0.attn.q"].b.shape
    torch.Size([8, 2])
    """
    transposed: Any = vjp(grad(_scalar(loss)), params)[1]

    def multiply(vector: Tree) -> Tree:
        return transposed(in_form_of(params, vector))[0]

    return multiply


def hessian(loss: Loss, params: Tree, *, chunk_size: int = CHUNK) -> Float[Tensor, "n n"]:
    """H itself, for small trees: n products, in the order of `ravel(params)`.

    Args:
        loss: A function of the params.
        params: θ, of n elements.
        chunk_size: Columns that are computed at once.

    Raises:
        InputError: as `hessian_operator` and `to_matrix` do.

    >>> hessian(lambda params: params["x"].prod(), {"x": torch.tensor([2.0, 3.0])})
    tensor([[0., 1.],
            [1., 0.]])
    """
    return to_matrix(hessian_operator(loss, params), params, chunk_size=chunk_size)


# -------------------------------------------------------------------------------------------------------- Gauss-Newton


def ggnvp(outputs: Outputs, loss: OutputLoss, params: Tree, vector: Tree) -> Tree:
    """G v = Jᵀ (∂²ℓ/∂z²) J v. It may be mapped over and differentiated.

    Args:
        outputs: z, a function of the params, such as the logits of all positions with a loss.
        loss: ℓ, a function of the outputs: cross-entropy with any weights of positions, squared error, ..
        params: θ.
        vector: v, of the form of the params.

    Raises:
        InputError: if `vector` is not of the form of the params, or `loss` does not return a scalar.

    Source: Schraudolph 2002, section 4.

    >>> def squared_error(outputs):
    ...     return outputs.square().sum() / 2
    >>> params = {"w": torch.tensor([1.0, 1.0])}
    >>> ggnvp(lambda p: p["w"] * torch.tensor([2.0, 3.0]), squared_error, params, params)
    {'w': tensor([4., 9.])}
    """
    z, tangent = jvp(outputs, (params,), (in_form_of(params, vector),))[:2]
    cotangent = hvp(loss, z, tangent)
    pull_back: Any = vjp(outputs, params)[1]
    return pull_back(cotangent)[0]


def ggn_operator(outputs: Outputs, loss: OutputLoss, params: Tree) -> Operator:
    """v -> G v at a point, for many v. The graphs of the outputs and of their derivative stay in memory as long as the
    operator does.

    Args:
        outputs: z, a function of the params.
        loss: ℓ, a function of the outputs.
        params: θ.

    Raises:
        InputError: if `loss` does not return a scalar; and from the operator, for a vector of another form.

    >>> import fgpt, torch.nn.functional as F
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> base, text = fgpt.init(config, fgpt.key(0)), torch.tensor([1, 2, 3, 4])
    >>> def logits(adapters):
    ...     return fgpt.apply(fgpt.adapt(base, adapters), text[:-1])
    >>> adapters = fgpt.lora(base, fgpt.key(1), rank=2)
    >>> operator = ggn_operator(logits, lambda z: F.cross_entropy(z, text[1:]), adapters)
    >>> operator(adapters)["blocks.0.attn.q"].b.shape
    torch.Size([8, 2])
    """
    z, push_forward, pull_back = jacobian_operators(outputs, params)
    output_hessian = hessian_operator(loss, z)

    def multiply(vector: Tree) -> Tree:
        return pull_back(output_hessian(push_forward(in_form_of(params, vector))))

    return multiply


# -------------------------------------------------------------------------------------------------------------- shared


class JacobianOperators(NamedTuple):
    """What `jacobian_operators` returns.

    Args:
        outputs: z at the params.
        push_forward: v -> J v, from the form of the params to that of the outputs.
        pull_back: u -> Jᵀ u, the other way.
    """

    outputs: Float[Tensor, "..."]
    push_forward: Callable[[Tree], Float[Tensor, "..."]]
    pull_back: Callable[[Float[Tensor, "..."]], Tree]


def jacobian_operators(outputs: Outputs, params: Tree) -> JacobianOperators:
    """v -> J v and u -> Jᵀ u at a point, J = ∂z/∂θ, for many v and u. Their graphs stay in memory as long as they do.

    Args:
        outputs: z, a function of the params.
        params: θ.

    >>> scales = torch.tensor([2.0, 3.0])
    >>> z, push_forward, pull_back = jacobian_operators(lambda p: p["w"] * scales, {"w": torch.ones(2)})
    >>> push_forward({"w": torch.tensor([1.0, 0.0])}), pull_back(torch.tensor([0.0, 1.0]))
    (tensor([2., 0.]), {'w': tensor([0., 3.])})
    """
    # Both are derivatives within a derivative, as kernels with one backward of their own see when they are called.
    z, transposed = vjp(lambda params: vjp(outputs, params)[0], params)[:2]
    # u -> Jᵀ u is linear, so its vector-Jacobian product is J v, at any u.
    doubly_transposed: Any = vjp(lambda u: vjp(outputs, params)[1](u)[0], torch.zeros_like(z))[1]
    return JacobianOperators(z, lambda v: doubly_transposed(v)[0], lambda u: transposed(u)[0])


def to_matrix(operator: Operator, like: Tree, *, chunk_size: int = CHUNK) -> Float[Tensor, "n n"]:
    """The matrix of an operator, for small trees: row i is its product with the i-th unit vector.

    Args:
        operator: A symmetric operator.
        like: A tree of the form of its vectors, of n elements; the order is that of `ravel`.
        chunk_size: Rows that are computed at once, by vmap.

    Raises:
        InputError: for a `chunk_size` below 1, and as `ravel` does.

    >>> to_matrix(lambda v: {"x": v["x"].flip(0)}, {"x": torch.zeros(2)})
    tensor([[0., 1.],
            [1., 0.]])
    """
    if chunk_size < 1:
        raise InputError(f"chunk_size is {chunk_size}: expected 1 or more")
    vector, unravel = ravel(like)
    n = len(vector)

    def row(unit: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return ravel(operator(unravel(unit)))[0]

    rows: list[Tensor] = []
    for start in range(0, n, chunk_size):
        indices = torch.arange(start, min(start + chunk_size, n), device=vector.device)
        rows.append(vmap(row)(F.one_hot(indices, n).to(vector.dtype)))
    return torch.cat(rows) if rows else vector.new_zeros(0, 0)


def in_form_of(params: Tree, vector: Tree) -> Tree:
    """`vector` with its dicts in the order of `params`. Raises InputError if it is not of their form."""
    expected, got = _by_path(params), _by_path(vector)
    if different := sorted(expected.keys() ^ got.keys()):
        raise InputError(f"expected a vector of the form of the params: {different[0]} is in one of them alone")
    for path, x in expected.items():
        if x.shape != got[path].shape or x.dtype != got[path].dtype:
            raise InputError(
                f"expected a vector of the form of the params: {path} is {_describe(got[path])}, not {_describe(x)}"
            )
    return tree_map(lambda _, y: y, params, vector)


def _by_path(tree: Tree) -> dict[str, Tensor]:
    return {"the tensor": tree} if isinstance(tree, Tensor) else leaves(tree)


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def _scalar(loss: Callable[[Any], Any]) -> Loss:
    """`loss`, which raises InputError if it returns anything but a scalar."""

    def call(x: Any) -> Tensor:
        value = loss(x)
        if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
            kind = _describe(value) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"expected a loss that returns a scalar, such as fgpt.loss; got {kind}")
        return value

    return call
