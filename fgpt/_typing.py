"""Shared types, and shape and type checks that vanish while compiling."""

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeAlias, TypeVar

import torch
from jaxtyping import jaxtyped

P = ParamSpec("P")
R = TypeVar("R")

StrPath: TypeAlias = str | os.PathLike[str]
"""A path in any form that `open` accepts."""


def check_shapes(fn: Callable[P, R]) -> Callable[P, R]:
    """Check the jaxtyping annotations of `fn` at every call: under grad, vmap and jvp too, where a mapped tensor
    shows the shape of one example.

    Inside `torch.compile` there are no checks: dynamo cannot trace them, and the eager run has already made them.
    """

    @functools.cache
    def with_checks() -> Callable[P, R]:
        from beartype import beartype  # here, because importing it takes longer than the rest of fgpt

        return jaxtyped(fn, typechecker=beartype)

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return (fn if torch.compiler.is_compiling() else with_checks())(*args, **kwargs)

    return call
