"""Rematerialization: keep the inputs of a function, not what it computes on the way, and run it again for its gradient.

    memory    Σ over blocks of all that a block computes   →   Σ over blocks of its input, and one block at a time
    work      forward + backward                           →   2 forward + backward

torch.utils.checkpoint does so by hooks on saved tensors, which torch.func refuses. Here it is an autograd.Function
whose rule for each transform moves the transform inside,

    vmap(remat(f)) = remat(vmap(f))        grad(remat(f)) = (the gradient of f, run below the transform)

so that f and its gradient run on plain tensors, and the graph between them lives no longer than one block. Also called
activation checkpointing.

    reference     f itself, which runs under forward mode, nested derivatives and compiled vmap
    fast path     under plain autograd, grad, vmap and any mixture of these with one grad, and under compiled grad

Source: Chen et al. 2016 (Training Deep Nets with Sublinear Memory Cost), section 4.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fgpt.kernels.functorch_state import (
    cotangents_are_differentiated,
    in_transform_or_compile,
    is_differentiated,
    is_recorded_by_autograd,
    needs_higher_order,
)

P = ParamSpec("P")
R = TypeVar("R")
Flat: TypeAlias = Callable[..., tuple[Tensor, ...]]
"""Tensors to a tuple of tensors: what an autograd.Function can take and return."""

_TENSOR = object()


def _split(tree: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """The tensors of `tree`, and a function that builds the tree of other tensors, which holds none itself."""
    leaves, structure = pytree.tree_flatten(tree)
    form = [_TENSOR if isinstance(x, Tensor) else x for x in leaves]

    def join(tensors: Sequence[Tensor]) -> Any:
        rest = iter(tensors)
        return pytree.tree_unflatten([next(rest) if x is _TENSOR else x for x in form], structure)

    return [x for x in leaves if isinstance(x, Tensor)], join


def _vmap(fn: Flat, info: Any, in_dims: Sequence[int | None]) -> Flat:
    return torch.func.vmap(fn, in_dims=tuple(in_dims[1:]), randomness=info.randomness)


def _pull_back(
    fn: Flat, recompute_fn: Flat, needs: Sequence[bool], gives: Sequence[bool], *operands: Tensor
) -> tuple[Tensor, ...]:
    """uᵀ ∂fn/∂x for each input x that needs it, by running `fn` again, or `recompute_fn` in its place.

    `operands` are all inputs, then a cotangent u for each output that `gives` one.
    """
    inputs, cotangents = operands[: len(needs)], operands[len(needs) :]
    transformed = in_transform_or_compile()
    run = fn if transformed else recompute_fn

    def outputs(*needed: Tensor) -> tuple[Tensor, ...]:
        rest = iter(needed)
        out = run(*(next(rest) if need else x for x, need in zip(inputs, needs, strict=True)))
        return tuple(y for y, give in zip(out, gives, strict=True) if give)

    needed = [x for x, need in zip(inputs, needs, strict=True) if need]
    if transformed:  # under vmap no tensor may be made to require a gradient
        return torch.func.vjp(outputs, *needed)[1](cotangents)
    with torch.enable_grad():
        needed = [x.detach().requires_grad_() for x in needed]
        dependent = [(y, u) for y, u in zip(outputs(*needed), cotangents, strict=True) if y.requires_grad]
    if not dependent:
        return tuple(torch.zeros_like(x) for x in needed)
    # vjp would keep the graph of this backward too: here each activation is freed once it is used
    out, cotangents = zip(*dependent, strict=True)
    return torch.autograd.grad(out, needed, cotangents, materialize_grads=True)


def _recorded_backward(
    fn: Flat, inputs: Sequence[Tensor], needs: Sequence[bool], cotangents: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """uᵀ ∂fn/∂x for each input x that needs it, by running `fn` again, recorded, so that it can be differentiated."""
    aliases = [x.view_as(x) for x in inputs]  # an input that depends on another gets its own part of the gradient
    dependent = [(y, u) for y, u in zip(fn(*aliases), cotangents, strict=True) if u is not None and y.requires_grad]
    needed = [x for x, need in zip(aliases, needs, strict=True) if need]
    if not dependent:
        return tuple(torch.zeros_like(x) if need else None for x, need in zip(inputs, needs, strict=True))
    out, us = zip(*dependent, strict=True)
    grads = iter(torch.autograd.grad(out, needed, us, create_graph=True, materialize_grads=True))
    return tuple(next(grads) if need else None for need in needs)


class _Below(torch.autograd.Function):
    """(fn, x_1, x_2, ...) -> fn(x_1, x_2, ...), below every grad, so that none of them records fn."""

    @staticmethod
    def forward(fn: Flat, *xs: Tensor) -> tuple[Tensor, ...]:
        return fn(*xs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError("remat has a first backward only: nest torch.func.grad or jvp instead")

    @staticmethod
    def vmap(info: Any, in_dims: Any, fn: Flat, *xs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Below.apply(_vmap(fn, info, in_dims), *xs), 0


class _Remat(torch.autograd.Function):
    """(fn, recompute_fn, x_1, x_2, ...) -> fn(x_1, x_2, ...), which saves x_1, x_2, ... and nothing else."""

    @staticmethod
    def forward(fn: Flat, recompute_fn: Flat, *xs: Tensor) -> tuple[Tensor, ...]:
        return fn(*xs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.runs = inputs[:2]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *grad: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        needs = tuple(ctx.needs_input_grad[2:])
        if is_recorded_by_autograd(*ctx.saved_tensors):
            return None, None, *_recorded_backward(ctx.runs[0], ctx.saved_tensors, needs, grad)
        pull_back = functools.partial(_pull_back, *ctx.runs, needs, tuple(u is not None for u in grad))
        # A compiler sees one graph and drops what nobody reads; what plain autograd differentiates must be recorded.
        if not torch.compiler.is_compiling() and not cotangents_are_differentiated(*grad):
            pull_back = functools.partial(_Below.apply, pull_back)
        grads = iter(pull_back(*ctx.saved_tensors, *(u for u in grad if u is not None)))
        return None, None, *(next(grads) if need else None for need in needs)

    @staticmethod
    def vmap(info: Any, in_dims: Any, fn: Flat, recompute_fn: Flat, *xs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        mapped = _vmap(fn, info, in_dims[1:])
        return _Remat.apply(mapped, mapped, *xs), 0


def remat(fn: Callable[P, R], recompute_fn: Callable[P, R] | None = None) -> Callable[P, R]:
    """`fn`, saving only its inputs for the backward, which runs `fn` again.

    Arguments and results are pytrees: node trees, tensors of any dtype, None, static config. Only arguments that need
    a gradient get one, so a frozen weight costs none. `fn` must be pure, and must take as an argument whatever tensor
    is differentiated or mapped over: a tensor that it closes over gets no gradient.

    Rematerialized under plain autograd, grad, vmap and any mixture of these with one grad, with the values and
    gradients of `fn` to the bit (to rounding where DoRA or IA3 scale rows, where norms are trained in bf16, and under
    grad for large fp32 products on AMD CPUs); and under torch.compile(grad), where `fn` is run again as inside two
    nested grads and its kernels may take their slower paths.
    Under jvp, jvp(grad), grad(grad) and torch.compile(vmap(...)) it is `fn` itself: right, at full memory. A backward
    that is recorded (create_graph=True) keeps what it records.

    Args:
        fn: A pure function.
        recompute_fn: A function with the same gradient, whose results nobody reads: what the backward runs in place of
            `fn` under plain autograd. None is `fn` itself.

    Source: Chen et al. 2016, section 4.

    >>> square = remat(lambda x: (x * x).sum())
    >>> torch.func.grad(square)(torch.tensor([1.0, 2.0]))
    tensor([2., 4.])
    """

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        tensors, join = _split((args, kwargs))
        if needs_higher_order(*tensors):
            return fn(*args, **kwargs)
        form: list[Callable[[Sequence[Tensor]], R]] = []
        compiling = torch.compiler.is_compiling()

        def flat(fn: Callable[P, R], *xs: Tensor) -> tuple[Tensor, ...]:
            a, k = join(xs)
            out, join_out = _split(fn(*a, **k))  # pyright: ignore[reportCallIssue]
            if not compiling:
                form[:] = [join_out]
            # a Function may not save what it returns: an argument handed through comes back as a view
            return tuple(y.view_as(y) if any(y is x for x in xs) else y for y in out)

        if compiling:
            # To dynamo the inputs of torch.func.grad require no gradient, and would get none; views of them do.
            tensors = [x.view_as(x) for x in tensors]
            plain = fn(*args, **kwargs)
            if not (torch.is_grad_enabled() and is_differentiated(*tensors)):
                return plain  # dynamo takes `fn` for the context of a Function that it does not differentiate
            form = [_split(plain)[1]]  # a Function may change nothing outside it; unread, this run is compiled away
        out = _Remat.apply(functools.partial(flat, fn), functools.partial(flat, recompute_fn or fn), *tensors)
        return form[0](out)  # pyright: ignore[reportArgumentType]

    return wrapper
