"""Which derivatives surround a call, and which tensors they follow.

A fused kernel with one backward asks before it runs. A tensor that a transform wraps answers for that level alone:
inside grad(vmap(f)) every tensor says that it requires no gradient. So no kernel asks `requires_grad`; all of them ask
`tracked`, which looks at every level.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad


def _kinds() -> list[Any]:
    return [layer.key() for layer in functorch.get_interpreter_stack() or ()]


def _dual() -> bool:
    """Whether forward AD is on: in torch.func.jvp and linearize, and where dual numbers are made by hand."""
    return forward_ad._current_level >= 0


def _differentiated_again() -> bool:
    kinds = _kinds()
    return _dual() or functorch.TransformType.Jvp in kinds or kinds.count(functorch.TransformType.Grad) > 1


def _differentiated_again_now() -> bool:
    return _differentiated_again() or functorch.TransformType.Vmap in _kinds()


# What torch.compiler.assume_constant_result sets. Calling it would import the compiler: seconds, at every import.
_differentiated_again_now._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def needs_higher_order(*operands: Tensor | None) -> bool:
    """True under forward AD, and where two reverse derivatives are nested, be it torch.func.grad in another or in plain
    autograd of `operands`: where a kernel that knows only its first backward cannot go.

    vmap, grad, vmap(grad) and grad(vmap) leave it False; compiled, vmap does not, as dynamo knows no vmap of an
    autograd.Function. The answer is a property of the program, never of the data, so a compiler may take it as a
    constant. Of a backward that is itself recorded (create_graph=True) no forward can know: see `recorded`.
    """
    if torch.compiler.is_compiling():
        return _differentiated_again_now()
    if _differentiated_again():
        return True
    return bool(_kinds()) and sum(_tracking(operands).values()) > 1


def _inside() -> bool:
    return _dual() or bool(_kinds())


_inside._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def in_transform() -> bool:
    """True under any transform at all, compiled or not."""
    return _inside()


def in_transform_or_compile() -> bool:
    """True under any transform at all, and while compiling, which has its own way with torch.func."""
    return torch.compiler.is_compiling() or in_transform()


# ------------------------------------------------------------------------------------------------- levels of a tensor


def _levels(x: Tensor) -> Iterator[Tensor]:
    """`x` as each transform around it sees it, the innermost first, and at last the tensor itself."""
    yield x
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
        yield x


def _tracking(operands: tuple[Tensor | None, ...]) -> dict[int, bool]:
    """The levels at which one of `operands` requires a gradient; plain autograd is level 0."""
    levels: dict[int, bool] = {}
    for x in operands:
        if x is not None:
            levels |= {max(functorch.maybe_get_level(y), 0): True for y in _levels(x) if y.requires_grad}
    return levels


def is_differentiated(*operands: Tensor | None) -> bool:
    """Whether a gradient of one of `operands` is wanted, by whichever transform, or by plain autograd."""
    if torch.compiler.is_compiling():
        return any(x.requires_grad for x in operands if x is not None)
    return any(y.requires_grad for x in operands if x is not None for y in _levels(x))


def is_recorded_by_autograd(*operands: Tensor | None) -> bool:
    """In a backward of plain autograd: whether it is itself recorded, for a second one (create_graph=True).

    torch.func.grad records every backward. What it makes of `operands` says no: there `differentiated_again` has chosen
    in the forward.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return not any(functorch.is_gradtrackingtensor(y) for x in operands if x is not None for y in _levels(x))


def is_recordable(*operands: Tensor | None) -> bool:
    """In a forward: whether plain autograd alone follows `operands`, so that its backward may be `recorded`."""
    return _followed_now(*operands) and functorch.TransformType.Grad not in _kinds()


def weightable(*operands: Tensor | None) -> bool:
    """In a forward: whether torch.func.grad follows `operands`, so that what comes into its backward may be
    `followed_beside`.
    """
    return _followed_now(*operands) and functorch.TransformType.Grad in _kinds()


def _followed_now(*operands: Tensor | None) -> bool:
    return not torch.compiler.is_compiling() and torch.is_grad_enabled() and is_differentiated(*operands)


def followed_beside(*cotangents: Tensor | None) -> bool:
    """In a backward of torch.func.grad: whether plain autograd follows what comes in, though it may not follow what the
    forward was given. So it does where a loss is weighted by what plain autograd goes on to differentiate by.
    """
    return bool(_kinds()) and 0 in _tracking(cotangents)


def is_vmapped(*operands: Tensor | None) -> int:
    """How many examples vmap computes at once where it meets these operands: the product over all nested vmaps."""
    if torch.compiler.is_compiling():
        return 1
    sizes: dict[int, int] = {}
    for x in operands:
        for y in () if x is None else _levels(x):
            if functorch.is_batchedtensor(y):
                size = functorch.get_unwrapped(y).shape[functorch.maybe_get_bdim(y)]
                sizes[functorch.maybe_get_level(y)] = size
    return math.prod(sizes.values())
