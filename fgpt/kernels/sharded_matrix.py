"""A frozen matrix in equal parts of its rows, each of which one process of torch.distributed holds:

    W = [W_0; W_1; ..; W_N-1]        W_r = rows r n to (r + 1) n of W,  n = ⌈out / N⌉

The part is held in any format. What a format has for each row, codes and the scales of blocks, is split; a code of 16
or 256 values and the scales of scales, 4 bytes for 16,384 elements, every process has. So the parts together are
exactly what the whole was, and no block of quantized scales need end where a part ends. The last parts are filled up
with rows of zeros, which are cut off the whole.

A product gathers W, multiplies and lets go; its adjoint gathers again, as a product with a quantized matrix dequantizes
again: see `fgpt.kernels.quantized_linear`. A frozen matrix has no gradient, so nothing is ever scattered. All
processes must compute the same products in the same order: one that computes fewer leaves the others waiting.

Or it gathers outputs in place of weights (tensor parallel), if all processes multiply the same x:

    x Wᵀ = [x W_0ᵀ, .., x W_N-1ᵀ]        g W = Σ_r g_r W_r,  g_r = columns r n to (r + 1) n of g

    reference     `join_rows` of all parts
    fast path     `gather_rows`, one all_gather for each tensor of a part, of its bytes as they are; of outputs
                  `gather_columns`, one all_gather for a product, and `sum_over_parts`, one all_reduce for its adjoint
    transforms    the whole is a constant to every transform; vmap over the parts raises InputError

Source: Rajbhandari et al. 2020 (ZeRO), section 5.3; Zhao et al. 2023 (PyTorch FSDP), section 3.2; Shoeybi et al. 2019
(Megatron-LM), section 3.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from fgpt.errors import InputError
from fgpt.tree import leaves, node, replace_at, static

all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""By the name that it has since torch 2.13, or the older one."""
ROW_LEAVES = ("", "codes", "absmax", "absmax.codes")
"""The tensors of a matrix that have as many entries for each row: itself, or codes and scales of blocks."""


Gathered: TypeAlias = Literal["weights", "outputs"]


@node
class Sharded:
    """What one process holds of a matrix that all hold together.

    Args:
        part: Its rows, with rows of zeros up to ⌈out / size⌉: a tensor, or codes and scales.
        out: The rows of the whole matrix.
        rank: The number of the process.
        size: How many there are.
        gathers: What a product gathers. For outputs all processes multiply the same x.

    >>> split_rows(torch.eye(3), rank=1, size=2).part
    tensor([[0., 0., 1.],
            [0., 0., 0.]])
    """

    part: Any
    out: int = static()
    rank: int = static()
    size: int = static()
    gathers: Gathered = static(default="weights")

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.out, self.part.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        return self.part.dtype


def local_part(w: Any) -> Any:
    """`w` itself, or what this process holds of a sharded one."""
    return w.part if isinstance(w, Sharded) else w


def row_range(out: int, rank: int, size: int) -> slice:
    """The rows of a matrix that the part of a rank has.

    >>> [row_range(5, rank, size=4) for rank in range(4)]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None), slice(5, 5, None)]
    """
    rows = -(-out // size)
    return slice(min(rank * rows, out), min((rank + 1) * rows, out))


def split_rows(w: Any, rank: int, size: int) -> Sharded:
    """The part of one rank, in memory of its own.

    Args:
        w: A tensor [out, in], or codes with their scales.
        rank: The number of the process, from 0.
        size: How many there are.

    Raises:
        InputError: if a block of elements with one scale lies across two rows.
    """
    out = w.shape[0]
    parts: dict[str, Tensor] = {}
    for path, x in _row_leaves(w).items():
        if len(x) % out:
            raise InputError(f"{len(x)} scales of {out} rows: a block lies across two rows, which are not sharded")
        per_row, rows = len(x) // out, row_range(out, rank, size)
        parts[path] = fill_rows(x[rows.start * per_row : rows.stop * per_row], -(-out // size) * per_row)
    return Sharded(replace_at(w, parts), out, rank, size)


def fill_rows(x: Shaped[Tensor, "rows *_"], total: int) -> Shaped[Tensor, "filled *_"]:
    """A copy of `x` with rows of zeros up to `total`."""
    return torch.cat([x, x.new_zeros(total - len(x), *x.shape[1:])])


def join_rows(parts: Sequence[Sharded]) -> Any:
    """The matrix that the parts of all ranks, in order, are together."""
    first = parts[0]
    tensors = [_row_leaves(p.part) for p in parts]
    return _whole(first, {path: torch.cat([x[path] for x in tensors]) for path in tensors[0]})


def gather_rows(w: Sharded) -> Any:
    """The whole matrix, by the parts of all ranks: each must call this at the same point of its program.

    Raises:
        InputError: if the default process group is not the one that the matrix was sharded for.
    """
    check_group(w)
    return _whole(w, {path: _AllGather.apply(x, w.size) for path, x in _row_leaves(w.part).items()})


def gather_parts(x: Shaped[Tensor, "rows *_"], size: int) -> Shaped[Tensor, "all *_"]:
    """The x of all `size` ranks, one below the other."""
    whole = x.new_empty(size * len(x), *x.shape[1:])
    all_gather(whole.view(torch.uint8), x.contiguous().view(torch.uint8))  # as bytes, which every backend takes
    return whole


def gather_columns(y: Float[Tensor, "*batch rows"], w: Sharded) -> Float[Tensor, "*batch out"]:
    """x Wᵀ of the whole matrix, by the y = x W_rᵀ of all ranks. Raises InputError as `gather_rows` does."""
    check_group(w)
    whole = gather_parts(y.movedim(-1, 0), w.size)
    return whole[: w.out].movedim(0, -1).contiguous()


def part_columns(g: Float[Tensor, "*batch out"], w: Sharded) -> Float[Tensor, "*batch rows"]:
    """The columns of `g` that this rank's rows of the matrix multiply, with zeros where those are filled up."""
    columns = g[..., row_range(w.out, w.rank, w.size)]
    return F.pad(columns, (0, w.part.shape[0] - columns.shape[-1]))


def sum_over_parts(x: Float[Tensor, "*batch in"], w: Sharded) -> Float[Tensor, "*batch in"]:
    """Σ_r g_r W_r over all ranks, added in at least fp32. Raises InputError as `gather_rows` does."""
    check_group(w)
    total = x.to(torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format, copy=True)
    dist.all_reduce(total)
    return total.to(x.dtype)


def check_group(w: Any) -> None:
    """Raises InputError if the default process group is not the one that `w`, which has a rank and a size, was split
    for.
    """
    there = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    if there != (w.rank, w.size):
        raise InputError(
            f"part {w.rank} of {w.size} of a sharded matrix in process {there[0]} of {there[1]}: initialize the "
            f"process group of {w.size} that it was sharded for"
        )


def _row_leaves(w: Any) -> dict[str, Tensor]:
    """The tensors of a matrix that are split, by their path in it."""
    tensors = {"": w} if isinstance(w, Tensor) else leaves(w)
    return {path: x for path, x in tensors.items() if path in ROW_LEAVES}


def _whole(w: Sharded, tensors: dict[str, Any]) -> Any:
    """The matrix of the row leaves of all parts one below the other, without the rows that filled the last ones."""
    rows = w.size * w.part.shape[0]
    return replace_at(w.part, {path: x[: w.out * (len(x) // rows)] for path, x in tensors.items()})


class _AllGather(torch.autograd.Function):
    """(x, size) -> the x of all ranks, one below the other. As a Function, it runs below every transform."""

    @staticmethod
    def forward(x: Tensor, size: int) -> Tensor:
        return gather_parts(x, size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise InputError("cannot vmap over sharded weights: map over the adapters and the examples")
