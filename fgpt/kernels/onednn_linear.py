"""The product of fp32 matrices on an AMD CPU: y = x Wᵀ + bias.

torch multiplies fp32 matrices by MKL. On AMD's CPUs oneDNN, which torch carries too, needs 0.87 to 0.93 of its time at
the shapes of a transformer (1,024 rows; 768 x 768 to 768 x 3,072), and 0.6 for logits, whose rows are not aligned.

    reference     torch.nn.functional.linear
    fast path     oneDNN's product, and for the gradient of x too
    transforms    under any of them, and compiled, the reference; a backward that is recorded is plain torch
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fgpt.kernels.functorch_state import in_transform_or_compile, is_batched_gradient

MIN_ELEMENTS = 1 << 18
MIN_PRODUCTS = 1 << 24
"""oneDNN's call takes 15 us longer than MKL's, which a smaller matrix does not pay for, but with many rows."""
ROW_UNITS = (32, 128)
"""A number of rows up to 512, or above, is filled up to a multiple of these. oneDNN compiles a kernel for each number
and keeps 1,024 of them, some 0.5 MB each: a training whose batches all had other numbers came to hold 1.1 GB of them.
"""
HAS_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")

reference = F.linear


def has_onednn_order(w: Float[Tensor, "out in"]) -> bool:
    """Whether oneDNN multiplies `w` as it lies in memory. Of any other strides its product takes 100 times as long."""
    return w.is_contiguous() or w.T.is_contiguous()


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False


USES_ONEDNN = HAS_ONEDNN and _is_amd()
"""Read once: a compiler does not read files, and would give up the block in which it meets one."""


def use_onednn(x: Float[Tensor, "*batch in"], w: Float[Tensor, "out in"]) -> bool:
    """Whether oneDNN's product is the faster one."""
    if not USES_ONEDNN or in_transform_or_compile():  # first: a compiler would make a program for each side of a size
        return False
    return (
        w.device.type == "cpu"
        and x.dtype == w.dtype == torch.float32
        and (w.numel() >= MIN_ELEMENTS or x.numel() * len(w) >= MIN_PRODUCTS)
        and has_onednn_order(w)
    )


def onednn_product(
    x: Float[Tensor, "*batch in"], w: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """x Wᵀ + bias, of any strides. Nothing is recorded for a gradient."""
    bias = None if bias is None else bias.contiguous()  # oneDNN reads it as if its elements were side by side
    return torch.ops.mkldnn._linear_pointwise.default(x, w, bias, "none", [], "")


def unit_rows_product(
    x: Float[Tensor, "*batch in"], w: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """`onednn_product` by one of few kernels: with rows of zeros up to a multiple of `ROW_UNITS`, which are left out of
    the result.
    """
    rows = x[..., 0].numel()
    unit = ROW_UNITS[rows > 512]
    if not rows % unit:
        return onednn_product(x, w, bias)
    flat = F.pad(x.reshape(rows, x.shape[-1]), (0, 0, 0, unit - rows % unit))
    y = onednn_product(flat, w, bias)
    return y.resize_(*x.shape[:-1], len(w))  # no view, into which a LoRA's update could not be added in place


class _OneDNNLinear(torch.autograd.Function):
    """Without a setup_context: no transform ever meets it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w)  # x only for a W that is trained
        return unit_rows_product(x, w, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x, w), (needs_x, needs_w, needs_bias) = ctx.saved_tensors, ctx.needs_input_grad
        flat = g.reshape(-1, g.shape[-1])
        dw = flat.T @ x.reshape(-1, x.shape[-1]) if needs_w else None
        return input_grad(g, w) if needs_x else None, dw, flat.sum(0) if needs_bias else None


def onednn_linear(
    x: Float[Tensor, "*batch in"], w: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """x Wᵀ + bias, where `use_onednn` holds."""
    return _OneDNNLinear.apply(x, w, bias)  # pyright: ignore[reportReturnType]


def input_grad(g: Float[Tensor, "*batch out"], w: Float[Tensor, "out in"]) -> Float[Tensor, "*batch in"]:
    """g W, the gradient of x Wᵀ in x: by the faster product, unless it is recorded or mapped over."""
    if torch.is_grad_enabled() or is_batched_gradient(g) or not use_onednn(g, w.T):
        return g @ w
    return unit_rows_product(g, w.T)
