"""A pure function as one compiled program.

    reference     the function itself
    fast path     its program by torch.compile, without derivatives and under plain autograd
    transforms    under any of them, and where a compiler traces it already, the function itself; a backward that is
                  recorded is the function's

torch.compile leaves what it cannot compile uncompiled, in silence: it takes an operation that it does not know out of
the program, and after the eighth program of a function it compiles no more. Here a function is one program or none, and
if it is none, a warning says why.
"""

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fgpt.errors import CompileWarning, one_line
from fgpt.kernels.functorch_state import (
    in_transform,
    in_transform_or_compile,
    is_differentiated,
    is_recorded_by_autograd,
)
from fgpt.tree import tree_leaves, unflatten_like

P = ParamSpec("P")
R = TypeVar("R")

SIZE_HINT = 64
"""What a compiler takes for the size of an axis that varies: not the size of the first tensor, so that no program
depends on what was computed first."""
MAX_CHARS = 200
"""Characters shown of a compiler's error."""


def mark_varying(x: Tensor, *axes: int) -> Tensor:
    """`x`, with axes whose sizes a compiled program takes as they come. One element is a case of its own, with another
    program.
    """
    for axis in axes:
        if x.shape[axis] > 1:
            torch._dynamo.mark_dynamic(x, axis, hint_override=SIZE_HINT)
    return x


def compile_or_warn(
    fn: Callable[P, R], name: str, *, fallback: Callable[P, R] | None = None, dynamic: bool | None = None
) -> Callable[P, R]:
    """`fn` as one program, which is compiled by the first call, and again for other structures, dtypes or static values
    of the arguments.

    If it cannot be compiled, a `CompileWarning` says why, once, and `fallback` runs: from then on, or for these
    arguments alone if torch's limit of programs is reached.

    Args:
        fn: A function of trees of tensors, static values and None.
        name: What the warning calls it.
        fallback: A function with the same results; None is `fn`.
        dynamic: What torch.compile takes: False compiles again for every size.
    """
    eager = fallback or fn
    failures: list[Exception] = []

    @functools.cache
    def program() -> Callable[P, R]:
        return torch.compile(fn, fullgraph=True, dynamic=dynamic)  # at the first call, as it imports the compiler

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if failures and not _is_limit(failures[0]):
            return eager(*args, **kwargs)
        try:
            with _without_limit_log():
                return program()(*args, **kwargs)
        except _compiler_errors() as err:
            if not failures:
                failures.append(err.with_traceback(None))
                warnings.warn(f"{name} runs uncompiled: {_reason(err)}", CompileWarning, stacklevel=2)
        return eager(*args, **kwargs)

    return call


class _Compiled(torch.autograd.Function):
    """(program, definition, x_1, x_2, ...) -> program(x_1, x_2, ...). What the program records is its own graph, whose
    backward does not run where the definition's stands in. Without a setup_context: no transform ever meets it.
    """

    @staticmethod
    def forward(ctx: Any, program: Callable[..., Tensor], definition: Callable[..., Tensor], *xs: Tensor) -> Tensor:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(need) for x, need in zip(xs, ctx.needs_input_grad[2:], strict=True)]
            y = program(*inputs)
        ctx.definition, ctx.graph = definition, (y, inputs)
        ctx.save_for_backward(*xs)
        return y.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        needs, graph = ctx.needs_input_grad[2:], ctx.graph
        ctx.graph = None  # its memory is free once it is used
        if graph is None or in_transform() or is_recorded_by_autograd(*ctx.saved_tensors):
            grads = iter(_definition_gradient(ctx.definition, ctx.saved_tensors, needs, g))
        else:
            y, inputs = graph
            needed = [x for x, need in zip(inputs, needs, strict=True) if need]
            grads = iter(torch.autograd.grad(y, needed, g, materialize_grads=True))
        return None, None, *(next(grads) if need else None for need in needs)


def _definition_gradient(
    definition: Callable[..., Tensor], xs: Sequence[Tensor], needs: Sequence[bool], g: Tensor
) -> tuple[Tensor, ...]:
    def of_needed(*needed: Tensor) -> Tensor:
        rest = iter(needed)
        return definition(*(next(rest) if need else x for x, need in zip(xs, needs, strict=True)))

    return torch.func.vjp(of_needed, *[x for x, need in zip(xs, needs, strict=True) if need])[1](g)


def compile_whole(
    fn: Callable[P, Tensor], name: str, mark: Callable[P, Any] = lambda *args, **kwargs: None
) -> Callable[P, Tensor]:
    """A function that returns one tensor, compiled wherever plain autograd or nobody differentiates it.

    Args:
        fn: A pure function of trees of tensors, static values and None.
        name: What a warning calls it, if it cannot be compiled.
        mark: Calls `mark_varying` for tensors of the arguments.

    >>> double = compile_whole(lambda x: 2 * x, "doubling")
    >>> torch.func.grad(double)(torch.tensor(1.0))  # under a transform, the function itself
    tensor(2.)
    """
    program = compile_or_warn(fn, name)

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if in_transform_or_compile():
            return fn(*args, **kwargs)
        leaves = tree_leaves([args, kwargs])

        def with_tensors(run: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Tensor:
            rest = iter(tensors)
            new = [next(rest) if isinstance(x, Tensor) else x for x in leaves]
            other_args, other_kwargs = unflatten_like([args, kwargs], new)
            return run(*other_args, **other_kwargs)

        def run_program(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            mark(*args, **kwargs)
            return program(*args, **kwargs)

        tensors = [x for x in leaves if isinstance(x, Tensor)]
        if not (torch.is_grad_enabled() and is_differentiated(*tensors)):
            return with_tensors(run_program, [x.detach() for x in tensors])
        return _Compiled.apply(  # pyright: ignore[reportReturnType]
            lambda *xs: with_tensors(run_program, xs), lambda *xs: with_tensors(fn, xs), *tensors
        )

    return call


def _compiler_errors() -> tuple[type[Exception], ...]:
    from torch._dynamo import exc

    return exc.TorchDynamoException, exc.FailOnRecompileLimitHit


@contextlib.contextmanager
def _without_limit_log() -> Iterator[None]:
    """Without torch's own lines about its limit of programs, which come again with every call that has none."""
    log = logging.getLogger("torch._dynamo.convert_frame")
    log.addFilter(_is_not_of_limit)
    try:
        yield
    finally:
        log.removeFilter(_is_not_of_limit)


def _is_not_of_limit(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("torch._dynamo hit config.")


def _is_limit(err: Exception) -> bool:
    return type(err).__name__ == "FailOnRecompileLimitHit"


def _reason(err: Exception) -> str:
    """An error of the compiler in one line: torch's own, without its advice."""
    if _is_limit(err):
        limit = torch._dynamo.config.recompile_limit
        return f"{limit} programs of it, for other shapes or structures, are torch's limit (recompile_limit)"
    return one_line(str(err).partition("\n\n")[0])[:MAX_CHARS]
