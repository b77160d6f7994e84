"""Shared types, and shape and type checks that vanish where they would be repeated."""

import functools
import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import ParamSpec, TypeAlias, TypeVar

import torch
from jaxtyping import jaxtyped

P = ParamSpec("P")
R = TypeVar("R")

StrPath: TypeAlias = str | os.PathLike[str]
"""A path in any form that `open` accepts."""

_within_check: ContextVar[bool] = ContextVar("within_check", default=False)
"""Whether this thread is in a function whose arguments were checked."""


def check_shapes(fn: Callable[P, R]) -> Callable[P, R]:
    """Check the jaxtyping annotations of `fn` at every call: under grad, vmap and jvp too, where a mapped tensor
    shows the shape of one example.

    The outermost function checks and those that it calls do not: at 24 layers the checks of each `attention` took a
    fifth of a small model's gradient. A backward pass, which may run blocks again, checks nothing, since its forward
    pass has. Inside `torch.compile` there are no checks: dynamo cannot trace them, and the eager run has already made
    them.
    """

    @functools.cache
    def with_checks() -> Callable[P, R]:
        from beartype import beartype  # here, because importing it takes longer than the rest of fgpt

        return jaxtyped(fn, typechecker=beartype)

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or _within_check.get() or torch._C._current_graph_task_id() != -1:
            return fn(*args, **kwargs)
        token = _within_check.set(True)
        try:
            return with_checks()(*args, **kwargs)
        finally:
            _within_check.reset(token)

    return call
