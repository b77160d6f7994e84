"""Which derivatives surround a call, and which tensors they follow.

A fused kernel with one backward asks before it runs. A tensor wrapped by a transform answers for that level alone:
inside grad(vmap(f)) every tensor has `requires_grad == False`. So no kernel reads `requires_grad`; all of them call
`is_differentiated`, which looks at every level.
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
    """True under forward AD, and if two reverse derivatives are nested, be it torch.func.grad in another or in plain
    autograd of `operands`: a kernel with only a first backward cannot run there.

    Under vmap, grad, vmap(grad) and grad(vmap) it is False; compiled, vmap makes it True, as dynamo has no vmap of an
    autograd.Function. The answer is a property of the program, never of the data, so a compiler may take it as a
    constant. Whether the backward is itself recorded (create_graph=True) no forward can know: see
    `is_recorded_by_autograd`.
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
    """True under any transform, compiled or not."""
    return _inside()


def in_vmap() -> bool:
    """True under vmap, except while compiling."""
    return not torch.compiler.is_compiling() and functorch.TransformType.Vmap in _kinds()


def is_one_vmap() -> bool:
    """True under a single vmap and no other transform, except while compiling."""
    return not torch.compiler.is_compiling() and not _dual() and _kinds() == [functorch.TransformType.Vmap]


def is_nested_jvp() -> bool:
    """True under torch.func.jvp of torch.func.jvp: there what an autograd.Function has saved for its forward mode has
    lost the tangents of the outer one, and a jvp that reads it is silently wrong.
    """
    return _kinds().count(functorch.TransformType.Jvp) > 1


def in_transform_or_compile() -> bool:
    """True under any transform, and while compiling."""
    return torch.compiler.is_compiling() or in_transform()


def is_undisturbed(*operands: Tensor) -> bool:
    """Whether plain torch computes a call and nothing more: no transform, no compiler, and no derivative."""
    return not in_transform_or_compile() and not any(x.requires_grad for x in operands)


def dual_outside_torch_func() -> bool:
    """Whether forward AD is on without torch.func.jvp: dual numbers made by hand, and linearize."""
    return not torch.compiler.is_compiling() and _dual() and functorch.TransformType.Jvp not in _kinds()


# ------------------------------------------------------------------------------------------------- levels of a tensor


def _levels(x: Tensor) -> Iterator[Tensor]:
    """`x` as each transform around it sees it, the innermost first, and last the plain tensor."""
    yield x
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
        yield x


def _tracking(operands: tuple[Tensor | None, ...]) -> dict[int, bool]:
    """The levels at which one of `operands` requires a gradient, as keys; plain autograd is level 0."""
    levels: dict[int, bool] = {}
    for x in operands:
        if x is not None:
            levels |= {max(functorch.maybe_get_level(y), 0): True for y in _levels(x) if y.requires_grad}
    return levels


def is_differentiated(*operands: Tensor | None) -> bool:
    """Whether one of `operands` is differentiated, by any transform or by plain autograd."""
    if torch.compiler.is_compiling():
        return any(x.requires_grad for x in operands if x is not None)
    return any(y.requires_grad for x in operands if x is not None for y in _levels(x))


def is_recorded_by_autograd(*operands: Tensor | None) -> bool:
    """In a backward of plain autograd: whether it is itself recorded, for a second one (create_graph=True).

    torch.func.grad records every backward. For the tensors that it wraps the answer is no: there `needs_higher_order`
    has chosen in the forward.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return not any(functorch.is_gradtrackingtensor(y) for x in operands if x is not None for y in _levels(x))


def is_recordable(*operands: Tensor | None) -> bool:
    """In a forward: whether plain autograd alone differentiates `operands`, so that the backward may be recorded."""
    return _is_differentiated_eagerly(*operands) and functorch.TransformType.Grad not in _kinds()


def is_weightable(*operands: Tensor | None) -> bool:
    """In a forward: whether torch.func.grad differentiates `operands`, so that the cotangents of its backward may be
    differentiated by plain autograd: see `cotangents_are_differentiated`.
    """
    return _is_differentiated_eagerly(*operands) and functorch.TransformType.Grad in _kinds()


def _is_differentiated_eagerly(*operands: Tensor | None) -> bool:
    return not torch.compiler.is_compiling() and torch.is_grad_enabled() and is_differentiated(*operands)


def cotangents_are_differentiated(*cotangents: Tensor | None) -> bool:
    """In a backward of torch.func.grad: whether plain autograd differentiates the cotangents, even if it does not
    differentiate the inputs of the forward. It does if the loss has a weight that is differentiated outside.
    """
    return bool(_kinds()) and 0 in _tracking(cotangents)


def is_mapped(x: Tensor) -> bool:
    """Whether vmap maps over `x`."""
    return not torch.compiler.is_compiling() and any(functorch.is_batchedtensor(y) for y in _levels(x))


def is_batched_gradient(g: Tensor) -> bool:
    """In a backward of plain autograd: whether it maps over this gradient (`is_grads_batched=True`). That vmap is no
    transform of torch.func.
    """
    return not torch.compiler.is_compiling() and functorch.is_legacy_batchedtensor(g)


def num_vmapped(*operands: Tensor | None) -> int:
    """The number of examples that vmap computes at once for these operands: the product over all nested vmaps."""
    if torch.compiler.is_compiling():
        return 1
    sizes: dict[int, int] = {}
    for x in operands:
        for y in () if x is None else _levels(x):
            if functorch.is_batchedtensor(y):
                size = functorch.get_unwrapped(y).shape[functorch.maybe_get_bdim(y)]
                sizes[functorch.maybe_get_level(y)] = size
    return math.prod(sizes.values())
