"""A training as a differentiable function: derivatives of what it ends with by what it was given.

    θ_T = advance(.. advance(advance(θ_0, 0, η), 1, η) .., T - 1, η)
    dL(θ_T)/dη = Σ_t (∂θ_{t+1}/∂η)ᵀ λ_{t+1}        λ_T = ∂L/∂θ_T,  λ_t = (∂θ_{t+1}/∂θ_t)ᵀ λ_{t+1}

η is anything that a step reads: weights of examples, learning rates, shares of a mixture. A state is all that a step
updates, moments included. `unroll` trains and keeps about √T states; `metagradient` goes backwards through the segments
between them, computes each again, and pulls λ through one step after the other: no more than 2 √T states and the graph
of one step are in memory.

AdamW has no derivative where a second moment is 0, as that of a fresh LoRA's A: give it an `eps_root`.

Source: Engstrom et al. 2025, "Optimizing ML Training with Metagradient Descent", section 2; Chen et al. 2016,
"Training Deep Nets with Sublinear Memory Cost", section 4.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from fgpt.errors import InputError
from fgpt.train_step import State
from fgpt.tree import leaves, tree_leaves, tree_map, unflatten_like

Tree: TypeAlias = Any
Advance: TypeAlias = Callable[[State, int, Tree], State]
"""(state, t, meta) -> the state after step t, counted from 0. It is computed several times: equal arguments, equal
results."""


class Unrolled(NamedTuple):
    """What `unroll` returns.

    Args:
        final: The state after the last step.
        checkpoints: States along the way by the number of steps before them, the first one at 0.
        num_steps: All steps.
    """

    final: State
    checkpoints: dict[int, State]
    num_steps: int


def unroll(
    advance: Advance, state: State, meta: Tree, num_steps: int, *, checkpoint_every: int | None = None
) -> Unrolled:
    """A training, and what `metagradient` needs of it.

    Args:
        advance: One step, such as `lambda state, t, weights: step(state, base, [batch(t, weights)], rng(t))[0]`.
        state: The state before the first step.
        meta: η, a tree of tensors.
        num_steps: T.
        checkpoint_every: Steps between two states that are kept. None takes √T.

    Raises:
        InputError: for a number of steps below 1.
    """
    if num_steps < 1 or (checkpoint_every is not None and checkpoint_every < 1):
        raise InputError(f"{num_steps} steps with a checkpoint every {checkpoint_every}: expected 1 or more")
    every = checkpoint_every or math.isqrt(num_steps - 1) + 1
    checkpoints: dict[int, State] = {}
    for t in range(num_steps):
        if t % every == 0:
            checkpoints[t] = state
        state = tree_map(torch.detach, advance(state, t, meta))
    return Unrolled(state, checkpoints, num_steps)


class Metagradient(NamedTuple):
    """What `metagradient` returns, with a leading axis if the cotangents have one.

    Args:
        meta: dL/dη, of the form of η.
        initial: dL by the initial state; of its integers 0.
    """

    meta: Tree
    initial: State


def metagradient(
    advance: Advance, unrolled: Unrolled, meta: Tree, cotangent: Tree, *, chunk_size: int | None = None
) -> Metagradient:
    """The derivative of a function of the final params by η and by the initial state.

    Args:
        advance: As in `unroll`.
        unrolled: What `unroll` returned for the same `advance` and `meta`.
        meta: η.
        cotangent: The derivative of that function by `unrolled.final.trainable`, of its form; or those of several
            functions, with a leading axis: one graph serves them all, mapped over.
        chunk_size: Cotangents that are mapped over at once. None takes all.

    Raises:
        InputError: for a cotangent of another form, and if a derivative is not finite.

    Source: Engstrom et al. 2025, "Optimizing ML Training with Metagradient Descent", section 2.

    >>> import fgpt
    >>> def loss(tree, frozen, scale, seed):
    ...     return scale * tree["w"].square().sum(), torch.tensor(1.0)
    >>> def sgd(grads, state, params):
    ...     return {"w": params["w"] - 0.1 * grads["w"]}, state
    >>> optimizer = fgpt.Optimizer(init=lambda params: (), update=sgd)
    >>> step = fgpt.make_step(loss, optimizer, max_norm=None)
    >>> advance = lambda state, t, scales: step(state, None, [scales[t]], None)[0]
    >>> state, scales = fgpt.init_state({"w": torch.tensor([1.0])}, optimizer), torch.tensor([1.0, 2.0])
    >>> result = unroll(advance, state, scales, 2)
    >>> result.final.trainable["w"]  # (1 - 0.2 · 1) (1 - 0.2 · 2)
    tensor([0.4800])
    >>> metagradient(advance, result, scales, {"w": torch.tensor([1.0])}).meta
    tensor([-0.1200, -0.1600])
    """
    several = _has_leading_axis(cotangent, unrolled.final.trainable)
    stacked = cotangent if several else tree_map(lambda x: x[None], cotangent)
    count = tree_leaves(stacked)[0].shape[0]
    zeros = [x.new_zeros(count, *x.shape) for x in tree_leaves(unrolled.final)]
    adjoint = [x for x in zeros if x.is_floating_point()]
    adjoint[: len(tree_leaves(stacked))] = tree_leaves(stacked)  # what is trained comes first in a state
    total = [x.new_zeros(count, *x.shape) for x in tree_leaves(meta)]
    end = unrolled.num_steps
    for begin in sorted(unrolled.checkpoints, reverse=True):
        states = _replay(advance, unrolled.checkpoints[begin], meta, begin, end)
        for t in reversed(range(begin, end)):
            adjoint, by_meta = _pull(advance, states.pop(), t, meta, adjoint, chunk_size)
            total = [x + y for x, y in zip(total, by_meta, strict=True)]
        end = begin
    by_initial = iter(adjoint)
    zeros = [next(by_initial) if x.is_floating_point() else x for x in zeros]
    result = Metagradient(unflatten_like(meta, total), unflatten_like(unrolled.final, zeros))
    if not all(bool(x.isfinite().all()) for x in total):
        raise InputError(
            "the derivative by meta is not finite: AdamW has none where a second moment is 0; expected a smooth "
            "optimizer, such as adamw(lr, eps_root=1e-8)"
        )
    return result if several else tree_map(lambda x: x[0], result)


def _replay(advance: Advance, state: State, meta: Tree, begin: int, end: int) -> list[State]:
    """The states before steps `begin` to `end` - 1."""
    states = [state]
    for t in range(begin, end - 1):
        states.append(tree_map(torch.detach, advance(states[-1], t, meta)))
    return states


def _pull(
    advance: Advance,
    state: State,
    t: int,
    meta: Tree,
    adjoint: list[Float[Tensor, "n ..."]],
    chunk_size: int | None,
) -> tuple[list[Float[Tensor, "n ..."]], list[Float[Tensor, "n ..."]]]:
    """The adjoints of the state before step t, and of η through this step, from those of the state after it."""
    with torch.enable_grad():
        inputs = tree_map(lambda x: x.detach().requires_grad_() if x.is_floating_point() else x, state)
        inputs_meta = tree_map(lambda x: x.detach().requires_grad_(), meta)
        outputs = _floats(advance(inputs, t, inputs_meta))
    sources = [*_floats(inputs), *tree_leaves(inputs_meta)]
    pairs = [(y, g) for y, g in zip(outputs, adjoint, strict=True) if y.requires_grad]

    def pull(*cotangents: Tensor) -> tuple[Tensor, ...]:
        ys = [y for y, _ in pairs]
        return torch.autograd.grad(ys, sources, cotangents, retain_graph=True, materialize_grads=True)

    cotangents = [g for _, g in pairs]
    if len(cotangents[0]) == 1:
        pulled = [x[None] for x in pull(*[g[0] for g in cotangents])]
    else:
        with warnings.catch_warnings():  # attention's backward runs once for each cotangent
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            pulled = [*vmap(pull, chunk_size=chunk_size)(*cotangents)]
    num_floats = len(sources) - len(tree_leaves(inputs_meta))
    return pulled[:num_floats], pulled[num_floats:]


def _floats(state: State) -> list[Tensor]:
    return [x for x in tree_leaves(state) if x.is_floating_point()]


def _has_leading_axis(cotangent: Tree, params: Tree) -> bool:
    """Whether there are several cotangents. Raises InputError if they are not of the form of `params`."""
    expected = {path: x.shape for path, x in leaves(params).items()}
    shapes = {path: x.shape for path, x in leaves(cotangent).items()}
    if shapes == expected:
        return False
    if {path: shape[1:] for path, shape in shapes.items()} == expected and len(
        {shape[0] for shape in shapes.values()}
    ) == 1:
        return True
    wrong = next(path for path in [*expected, *shapes] if shapes.get(path) != expected.get(path))
    raise InputError(
        f"the cotangent has {_describe(shapes, wrong)} at {wrong} and the final params {_describe(expected, wrong)}: "
        "expected the same, or one leading axis more in every leaf"
    )


def _describe(shapes: dict[str, torch.Size], path: str) -> str:
    return f"shape {list(shapes[path])}" if path in shapes else "nothing"
