"""The product of a frozen matrix, and a LoRA's update of it, under vmap: of many adapters, or of many examples.

    y_m = x_m Wᵀ + bias + s x̃_m A_mᵀ B_mᵀ        for each m that is mapped over

vmap by itself multiplies each term apart and adds them. Here the product with W is one over the rows of all m, by
oneDNN where it is faster; those with A and B are batched, and added in place.

    reference     the terms in plain torch
    fast path     the above, with a backward of its own
    transforms    a first backward under any mixture of vmap and one grad; a backward that is recorded is plain torch;
                  under forward mode and nested derivatives `adapted_linear` does not come here
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt.kernels.functorch_state import (
    cotangents_are_differentiated,
    in_vmap,
    is_differentiated,
    is_mapped,
    is_recorded_by_autograd,
    needs_higher_order,
    num_vmapped,
)
from fgpt.kernels.mapped_axis import fold, unfold
from fgpt.kernels.quantized_linear import FrozenMatrix, frozen_product, linear_input_grad

MIN_PRODUCTS = 1 << 27
"""Multiplications of all members below which the calls of the fast path cost more than they save."""


def reference(
    x: Float[Tensor, "members rows in"],
    lora_x: Float[Tensor, "members rows in"],
    w: Float[Tensor, "out in"] | FrozenMatrix,
    bias: Float[Tensor, " out"] | None,
    a: Float[Tensor, "members rank in"] | None,
    b: Float[Tensor, "members out rank"] | None,
    scale: float,
) -> Float[Tensor, "members rows out"]:
    """The definition."""
    y = frozen_product(x, w, bias)
    return y if a is None or b is None else y + scale * (lora_x @ a.mT) @ b.mT


def applies(x: Tensor, w: Tensor | FrozenMatrix, bias: Tensor | None, *factors: Tensor | None) -> bool:
    """Whether `mapped_linear` can be called: x is mapped over, W and bias are not, and they have no gradient."""
    if not in_vmap() or _autocasts(x.device.type):
        return False
    if x.numel() * w.shape[0] * num_vmapped(x, *factors) < MIN_PRODUCTS:
        return False
    base = [w, bias] if isinstance(w, Tensor) else [bias]
    constants = [t for t in base if t is not None]
    return (
        not needs_higher_order(x, *constants, *factors)
        and (is_mapped(x) or any(is_mapped(t) for t in factors if t is not None))
        and not any(is_mapped(t) for t in constants)
        and not is_differentiated(*constants)
    )


def _autocasts(device_type: str) -> bool:
    """Whether torch changes the dtypes of products."""
    return device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)


def _pull_back(
    scale: float,
    same_input: bool,
    needs: tuple[bool, ...],
    w: Tensor | FrozenMatrix,
    g: Tensor,
    lora_x: Tensor | None,
    low: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, x̃, A and B. If x̃ is x, that of x is both.

    A product whose result has a few columns is computed transposed: (rowsᵀ g)ᵀ takes a quarter of the time of gᵀ rows.
    """
    needs_x, needs_lora_x, needs_a, needs_b = needs
    dx = linear_input_grad(g, w) if needs_x else None
    if low is None or a is None or b is None or lora_x is None:
        return dx, None, None, None
    d_low = scale * (g @ b.mT.contiguous().mT)
    d_lora_x = None
    if same_input and dx is not None:
        dx = dx + d_low @ a if torch.is_grad_enabled() else torch.baddbmm(dx, d_low, a, out=dx)
    elif needs_lora_x:
        d_lora_x = d_low @ a
    da = d_low.mT @ lora_x if needs_a else None
    db = scale * (low.mT @ g).mT if needs_b else None
    return dx, d_lora_x, da, db


class _MappedLinear(torch.autograd.Function):
    """(scale, same_input, w, x, lora_x, bias, a, b) -> (y, low)"""

    @staticmethod
    def forward(
        scale: float,
        same_input: bool,
        w: Tensor | FrozenMatrix,
        x: Tensor,
        lora_x: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        y = frozen_product(x, w, bias)
        if a is None or b is None:
            return y, None
        low = lora_x @ a.mT
        return y.baddbmm_(low, b.mT, alpha=scale), low

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        ctx.scale, ctx.same_input, w, _, lora_x, _, a, b = inputs
        ctx.set_materialize_grads(False)
        ctx.quantized = None if isinstance(w, Tensor) else w
        low = output[1]
        if low is not None:
            ctx.mark_non_differentiable(low)
        saved_lora_x = None if low is None else lora_x
        ctx.save_for_backward(w if isinstance(w, Tensor) else None, saved_lora_x, low, a, b)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if g is None:
            return (None,) * 8
        w, lora_x, low, a, b = ctx.saved_tensors
        needs = tuple(ctx.needs_input_grad[i] for i in (3, 4, 6, 7))
        arguments = ctx.scale, ctx.same_input, needs, ctx.quantized if w is None else w, g, lora_x, low, a, b
        if is_recorded_by_autograd(g, lora_x, a, b) or cotangents_are_differentiated(g):
            if low is not None:  # differentiated again: through the product that made it
                arguments = *arguments[:6], lora_x @ a.mT, a, b
            dx, d_lora_x, da, db = _pull_back(*arguments)
        else:
            dx, d_lora_x, da, db = _PullBack.apply(*arguments)  # pyright: ignore[reportGeneralTypeIssues]
        return None, None, None, dx, d_lora_x, None, da, db

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *inputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        scale, same_input, w, x, lora_x, bias, a, b = inputs
        x, lora_x, a, b = fold(info.batch_size, [in_dims[i] for i in (3, 4, 6, 7)], (x, lora_x, a, b))
        y, low = _MappedLinear.apply(scale, same_input, w, x, lora_x, bias, a, b)  # pyright: ignore[reportGeneralTypeIssues]
        return unfold(info.batch_size, (y, low))


class _PullBack(torch.autograd.Function):
    """`_pull_back` under transforms."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor | None, ...]:
        return _pull_back(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError("this backward has no derivative: `applies` lets no nested derivative come here")

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *inputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        folded = fold(info.batch_size, in_dims[4:], inputs[4:])
        return unfold(info.batch_size, _PullBack.apply(*inputs[:4], *folded))  # pyright: ignore[reportArgumentType]


def mapped_linear(
    x: Float[Tensor, "rows in"],
    lora_x: Float[Tensor, "rows in"],
    w: Float[Tensor, "out in"] | FrozenMatrix,
    bias: Float[Tensor, " out"] | None,
    a: Float[Tensor, "rank in"] | None,
    b: Float[Tensor, "out rank"] | None,
    scale: float,
) -> Float[Tensor, "rows out"]:
    """x Wᵀ + bias + s x̃ Aᵀ Bᵀ of one member, where `applies` holds; `lora_x` is x̃, x after dropout."""
    member, a, b = x[None], *(None if t is None else t[None] for t in (a, b))
    lora_member = member if lora_x is x else lora_x[None]
    y, _ = _MappedLinear.apply(scale, lora_x is x, w, member, lora_member, bias, a, b)  # pyright: ignore[reportGeneralTypeIssues]
    return y.squeeze(0)  # y[0] would have a backward that fills zeros first
