"""A matrix that is trained in equal parts of its rows, each of which one process of torch.distributed holds:

    W = G(W_0, .., W_N-1) = [W_0; W_1; ..; W_N-1]        W_r = rows r n to (r + 1) n of W,  n = ⌈out / N⌉

A product gathers W in the dtype of its input, multiplies and lets go. Its derivative gathers W again, and the gradient
of a part is the sum over all processes of their gradients of those rows, in the dtype of the part:

    S(M_0, .., M_N-1) = rows r n to (r + 1) n of Σ_i M_i        in process r

G and S are each other's adjoint, so a product and its derivatives are three bilinear maps, closed under derivatives of
every order, and the loss that a gradient belongs to is Σ_r of the processes' losses:

    P(x, W) = x G(W)ᵀ        Q(g, W) = g G(W)        R(g, x) = S(gᵀ x)

All processes must compute the same products in the same order: one that computes fewer leaves the others waiting.

    reference     `gather`, and a plain product
    fast path     one all_gather for each P and Q, one reduce_scatter for each R
    transforms    grad and jvp of every order pass, jvp of jvp by the reference; vmap raises InputError, as the gradient
                  of a part is one of all processes

Source: Rajbhandari et al. 2020 (ZeRO), section 5.3: stage 3; Zhao et al. 2023 (PyTorch FSDP), section 3.2.
"""

from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fgpt.errors import InputError
from fgpt.kernels.functorch_state import is_nested_jvp, is_undisturbed
from fgpt.kernels.sharded_matrix import check_group, fill_rows, gather_parts, row_range
from fgpt.tree import node, static, walk

reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""By the name that it has since torch 2.13, or the older one."""
MAPPED = "cannot vmap over parameters in parts, nor over examples with them: their gradient is one of all processes"


@node
class ShardedParameter:
    """What one process holds of a trained matrix that all hold together.

    Args:
        part: Its rows, with rows of zeros up to ⌈out / size⌉.
        out: The rows of the whole matrix.
        rank: The number of the process.
        size: How many there are.
        dtype: Of the whole matrix. `adapt` makes it that of the base; the part may have more digits.

    >>> ShardedParameter(torch.ones(2, 4), out=3, rank=0, size=2).shape
    torch.Size([3, 4])
    """

    part: Float[Tensor, "rows in"]
    out: int = static()
    rank: int = static()
    size: int = static()
    dtype: torch.dtype = static(default=torch.float32)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.out, self.part.shape[1]))


def split_parameter(w: Float[Tensor, "out in"], like: ShardedParameter) -> ShardedParameter:
    """The part of this process of a whole matrix, as `like` is: the inverse of `gather`."""
    rows = w[row_range(like.out, like.rank, like.size)].to(like.part.device, like.part.dtype)
    return replace(like, part=fill_rows(rows, len(like.part)))


def gather(w: ShardedParameter, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
    """The whole matrix, differentiable, in its dtype unless another is given: each process must call this at the same
    point of its program.

    Raises:
        InputError: if the default process group is not the one that the matrix was split for.
    """
    check_group(w)
    whole: Tensor = _GatherOrScatter.apply(w.part, False, dtype or w.dtype, w.size)  # pyright: ignore
    return whole[: w.out]


def parameter_linear(
    x: Float[Tensor, "*batch in"], w: ShardedParameter, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "*batch out"]:
    """x Wᵀ + bias. Raises InputError as `gather` does."""
    if is_nested_jvp():
        return F.linear(x, gather(w, x.dtype), bias)
    check_group(w)
    rows = x.reshape(-1, x.shape[-1])
    form = w.out, w.size, w.part.dtype
    if bias is None:
        return _product("P", rows, w.part, *form).view(*x.shape[:-1], w.out)
    # Added by the operator that multiplies: in half precision that rounds once.
    y = _product("P", rows, w.part, *form, bias.detach()).view(*x.shape[:-1], w.out)
    return y if is_undisturbed(bias) else y + (bias - bias.detach())  # 0, with the derivatives of the bias


def has_sharded_parameters(tree: Any) -> bool:
    """Whether a matrix in `tree` is trained in parts.

    >>> has_sharded_parameters({"w": torch.ones(2, 4)})
    False
    """
    return any(isinstance(x, ShardedParameter) for _, x in walk(tree))


def _scatter_sums(whole: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    """The rows of this process of the sum over all; `whole` has the rows that fill the last part, or not."""
    rows = -(-len(whole) // size)
    filled = F.pad(whole.to(dtype), (0, 0, 0, rows * size - len(whole))).contiguous()
    part = filled.new_empty(rows, *filled.shape[1:])
    reduce_scatter(part, filled)
    return part


class _GatherOrScatter(torch.autograd.Function):
    """(x, scatters, dtype, size) -> G(x), or S(x) if it scatters. Each is linear, and the adjoint of the other."""

    @staticmethod
    def forward(x: Tensor, scatters: bool, dtype: torch.dtype, size: int) -> Tensor:
        return _scatter_sums(x, dtype, size) if scatters else gather_parts(x.to(dtype), size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *ctx.form = inputs
        ctx.input_dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        scatters, _, size = ctx.form
        return _GatherOrScatter.apply(g, not scatters, ctx.input_dtype, size), None, None, None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _GatherOrScatter.apply(t, *ctx.form)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise InputError(MAPPED)


Map: TypeAlias = Literal["P", "Q", "R"]


class _Product(torch.autograd.Function):
    """(a, b, map, out, size, dtype of parts, bias): P(x, W) + bias, Q(g, W) or R(g, x), where a W is the part of it,
    and so are R's result and its cotangent. The bias is a constant.
    """

    @staticmethod
    def forward(
        a: Tensor, b: Tensor, kind: Map, out: int, size: int, part_dtype: torch.dtype, bias: Tensor | None
    ) -> Tensor:
        if kind == "R":
            return _scatter_sums(a.T @ b, part_dtype, size)
        whole = gather_parts(b.to(a.dtype), size)[:out]
        return F.linear(a, whole, bias) if kind == "P" else a @ whole

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, ctx.kind, *ctx.form, _ = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, b = ctx.saved_tensors
        of_a, of_b = {
            "P": (("Q", c, b), ("R", c, a)),  # of x and W
            "Q": (("P", c, b), ("R", a, c)),  # of g and W
            "R": (("P", b, c), ("Q", a, c)),  # of g and x
        }[ctx.kind]
        needs_a, needs_b, *others = ctx.needs_input_grad
        a_grad = _product(*of_a, *ctx.form) if needs_a else None
        return a_grad, _product(*of_b, *ctx.form) if needs_b else None, *[None for _ in others]

    @staticmethod
    def jvp(ctx: Any, ta: Tensor | None, tb: Tensor | None, *_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, b = ctx.saved_tensors
        terms: list[Tensor] = []
        if ta is not None:
            terms.append(_product(ctx.kind, ta, b, *ctx.form))
        if tb is not None:
            terms.append(_product(ctx.kind, a, tb, *ctx.form))
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise InputError(MAPPED)


def _product(
    kind: Map, a: Tensor, b: Tensor, out: int, size: int, part_dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    return _Product.apply(a, b, kind, out, size, part_dtype, bias)  # pyright: ignore[reportReturnType]
