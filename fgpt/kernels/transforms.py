"""Which torch.func transforms surround this call. A fused kernel with one backward asks before it runs."""

from typing import Any

import torch
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]


def _kinds() -> list[Any]:
    return [layer.key() for layer in functorch.get_interpreter_stack() or ()]


def _differentiated_again() -> bool:
    kinds = _kinds()
    return functorch.TransformType.Jvp in kinds or kinds.count(functorch.TransformType.Grad) > 1


def _differentiated_again_now() -> bool:
    return _differentiated_again() or functorch.TransformType.Vmap in _kinds()


# What torch.compiler.assume_constant_result sets. Calling it would import the compiler: seconds, at every import.
_differentiated_again_now._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def differentiated_again() -> bool:
    """True under jvp, or under two nested grads: where a kernel that knows only its first backward cannot go.

    vmap, grad and vmap(grad) leave it False; compiled, vmap does not, as dynamo knows no vmap of an autograd.Function.
    The answer is a property of the program, never of the data, so a compiler may take it as a constant.
    """
    return _differentiated_again_now() if torch.compiler.is_compiling() else _differentiated_again()


def _inside() -> bool:
    return bool(_kinds())


_inside._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def inside() -> bool:
    """True under any transform at all, compiled or not."""
    return _inside()


def transformed() -> bool:
    """True under any transform at all, and while compiling, which has its own way with torch.func."""
    return torch.compiler.is_compiling() or inside()
