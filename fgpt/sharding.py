"""A frozen base in parts, as a transform of the params tree: each process holds 1 / N of each matrix, and its products
gather the others' parts, see `fgpt.kernels.sharded_matrix`.

    torchrun --nproc-per-node 2 train.py        in it, after init_process_group:

    params = fgpt.load("llama", torch.bfloat16, quantize="nf4", shard=True)
    step = fgpt.make_step(loss, optimizer, world=fgpt.world())

Adapters, norms and biases every rank holds whole, and so is the result of a product: losses, transforms and optimizers
know nothing of it. What all ranks must do is run the same program. A rank that computes fewer products than the others
leaves them waiting. `make_step` and `map_over_ranks` let one that has nothing of its own compute what another does;
evaluate and generate on all of them, of as many rows and tokens, and merge and save on all of them.
"""

from dataclasses import replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt import distributed
from fgpt.distributed import World, from_first_rank
from fgpt.errors import InputError
from fgpt.kernels.leaf_lists import square_norm
from fgpt.kernels.quantized_linear import (
    QUANTIZED,
    Blockwise4bit,
    Blockwise8bit,
    FrozenMatrix,
    Rotated,
    quantize_scales,
)
from fgpt.kernels.sharded_matrix import Sharded, fill_rows, gather_rows, row_range, split_rows
from fgpt.kernels.sharded_parameter import ShardedParameter, gather, has_sharded_parameters, split_parameter
from fgpt.layers import weight_matrices
from fgpt.quantization import quantize_weight
from fgpt.tree import get_at, leaves, replace_at, select, tree_map, walk
from fgpt.weights import Weight

T = TypeVar("T")

PARTS = (Sharded, ShardedParameter)
BLOCKS = r"blocks\..*"
"""The layers of all blocks."""


def shard(params: T, *, world: World | None = None, target: str = BLOCKS) -> T:
    r"""`params` with the weights of some layers in parts: of each, this process holds 1 / N of the rows, in the format
    that they have. Products, gradients of every order, `merge` and `save` are to the bit those of the whole weights,
    if all processes call them alike; but large fp32 products under torch.func's transforms on an AMD CPU, which another
    library computes, differ by rounding. `save` gathers on rank 0's host, which must have room for the whole model.

    Args:
        params: The same plain or quantized params tree in each process; adapt it afterwards.
        world: The processes and which one this is; None is the default group of torch.distributed.
        target: A regular expression; layers whose whole path it matches are sharded. `".*"` shards the embeddings and
            the head too, which are then gathered for each batch.

    Returns:
        The tree in parts; of a process by itself, `params` as they are.

    Raises:
        InputError: if `target` matches nothing, or a weight that is adapted or sharded already.

    Source: Rajbhandari et al. 2020 (ZeRO), section 5.3; Zhao et al. 2023 (PyTorch FSDP), section 3.2.

    >>> import fgpt
    >>> from fgpt.tree import nbytes
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=64, n_ctx=16, vocab_size=11, d_mlp=64)
    >>> params = fgpt.init(config, fgpt.key(0))
    >>> part = fgpt.shard(params, world=fgpt.distributed.World(rank=0, size=4))
    >>> nbytes(part.blocks[0].mlp) / nbytes(params.blocks[0].mlp) < 0.27  # a quarter, and the biases
    True
    >>> fgpt.shard(params) is params  # a process by itself
    True
    """
    here = distributed.world() if world is None else world
    weights = weight_matrices(params)
    paths = select(weights, target)
    if here.size == 1:
        return params
    return replace_at(params, {f"{path}.w": shard_weight(path, weights[path], here) for path in paths})


def tensor_parallel(params: T, *, world: World | None = None, target: str = BLOCKS) -> T:
    r"""`params` in parts whose products gather outputs: each process multiplies with its rows of a matrix, and all then
    have the whole product. Every process takes the same examples and computes the same, so a gradient needs no sum:
    `make_step` without a world. Results are those of the whole weights up to the order of sums, and to the bit the same
    in all processes.

    `shard` moves a matrix's bytes for each product, this one those of 4 or 8 bytes for each token and output: it is for
    few tokens, such as decoding, and for one example that is too large for one process. Attention, norms and adapters
    every process computes whole.

    Args:
        params: The same plain or quantized params tree in each process, or one of `shard` or `load(.., shard=True)`.
        world: The processes and which one this is; None is the default group of torch.distributed.
        target: A regular expression; layers whose whole path it matches are sharded.

    Raises:
        InputError: as `shard` does.

    Source: Shoeybi et al. 2019 (Megatron-LM), section 3; here each product is split by its outputs.

    >>> import fgpt
    >>> params = fgpt.init(fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32), fgpt.key(0))
    >>> part = fgpt.tensor_parallel(params, world=fgpt.distributed.World(rank=0, size=4))
    >>> part.blocks[0].mlp.up.w.gathers, part.blocks[0].mlp.up.w.part.shape
    ('outputs', torch.Size([8, 8]))
    """
    parts = params if has_sharded(params) else shard(params, world=world, target=target)
    matrices = {path: replace(x, gathers="outputs") for path, x in walk(parts) if isinstance(x, Sharded)}
    return replace_at(parts, matrices) if matrices else parts


def shard_weight(path: str, w: Weight, here: World) -> FrozenMatrix:
    """The part of a rank of the weight of the layer at `path`. Raises InputError as `shard` does."""
    if isinstance(w, Rotated) and not isinstance(w.base, Sharded):
        return replace(w, base=split_rows(w.base, here.rank, here.size))
    if isinstance(w, (Rotated, *PARTS)) or not isinstance(w, (Tensor, *QUANTIZED)):
        form = "sharded" if isinstance(w, (Rotated, *PARTS)) else "adapted"
        raise InputError(f"{path} is {form} already: shard a plain or quantized params tree, then adapt it")
    return split_rows(w, here.rank, here.size)


def shard_rows(x: Float[Tensor, "rows in"], out: int, here: World) -> Sharded:
    """The part of a rank, of its rows of a matrix that has `out` in all."""
    return Sharded(fill_rows(x, -(-out // here.size)), out, here.rank, here.size)


def quantize_rows(
    path: str, x: Float[Tensor, "rows in"], out: int, here: World, format: Any, *, double_quant: bool, rotate: bool
) -> FrozenMatrix:
    """The part of a rank of the weight of the layer at `path`, quantized: of its rows of a matrix that has `out` in
    all, the codes of the whole. All ranks must call it, as scales that are quantized too depend on those of all rows.

    Raises InputError as `quantize_weight` does.
    """
    part = quantize_weight(path, fill_rows(x, -(-out // here.size)), format, double_quant=False, rotate=rotate)
    codes = part.base if isinstance(part, Rotated) else part
    if isinstance(codes, Blockwise4bit) and double_quant:
        assert isinstance(codes.absmax, Tensor)
        own_scales = codes.absmax.view(len(codes.codes), -1)
        scales = gather_rows(Sharded(own_scales, out, here.rank, here.size))
        whole = quantize_scales(codes, scales.flatten())
        assert isinstance(whole.absmax, Blockwise8bit)
        of_rows = whole.absmax.codes.view(out, -1)[row_range(out, here.rank, here.size)]
        filled = fill_rows(of_rows, len(codes.codes)).flatten()
        codes = replace(whole, absmax=replace(whole.absmax, codes=filled))
    sharded = Sharded(codes, out, here.rank, here.size)
    return replace(part, base=sharded) if isinstance(part, Rotated) else sharded


def has_sharded(params: Any) -> bool:
    """Whether a matrix in `params` is in parts, frozen or trained."""
    return any(isinstance(x, PARTS) for _, x in walk(params))


def is_tensor_parallel(params: Any) -> bool:
    """Whether products with a part of `params` gather outputs."""
    return any(isinstance(x, Sharded) and x.gathers == "outputs" for _, x in walk(params))


def unshard(params: T) -> T:
    """`params` with every matrix that is in parts whole again, in each process: all of them must call it. What is
    trained is in the dtype of its parts, and a model that it replaces leaves of in that of the base.

    Args:
        params: A tree of `shard`, adapted or not, or what is trained over it, or its optimizer's state.

    Raises:
        InputError: if the process group is not the one that the weights were sharded for.

    >>> import fgpt
    >>> params = fgpt.init(fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32), fgpt.key(0))
    >>> fgpt.unshard(fgpt.shard(params)) is params  # a process by itself
    True
    """
    whole = {path: _gather(x) for path, x in walk(params) if isinstance(x, PARTS)}
    return replace_at(params, whole) if whole else params


def gather_on_first(params: T) -> T | None:
    """`params`, or another tree, with every matrix that is in parts whole, on the host, in the process of rank 0; None
    in the others. All must call it; on a device there is never more than one whole matrix.
    """
    is_first = distributed.world().rank == 0
    whole: dict[str, Any] = {}
    for path, x in walk(params):
        if isinstance(x, PARTS):
            matrix = _gather(x)
            if is_first:
                whole[path] = _on_host(matrix)
    return _on_host(replace_at(params, whole)) if is_first else None


def split_from_first(whole: Any | None, like: T) -> T:
    """The tree that `gather_on_first` has made of one as `like`, in parts again: each process gets its own, and all
    other leaves. All must call it; it sends one whole matrix after the other.

    Args:
        whole: The tree, in the process of rank 0; None in the others.
        like: A tree of the same structure whose matrices are in parts.
    """
    parts: dict[str, Any] = {path: x for path, x in walk(like) if isinstance(x, ShardedParameter)}
    others, _ = _whole_and_parts(like)
    sources = {path: get_at(whole, path) for path in [*parts, *others]} if whole is not None else {}

    def receive(path: str, size: torch.Size, like: Tensor) -> Tensor:
        x = sources[path].to(like.device, like.dtype) if sources else like.new_empty(size)
        return from_first_rank(x)

    for path, x in parts.items():
        parts[path] = split_parameter(receive(path, x.shape, x.part), x)
    return replace_at(like, {**parts, **{path: receive(path, x.shape, x) for path, x in others.items()}})


def whole_on_meta(tree: T) -> T:
    """`tree` with the shapes and dtypes that `gather_on_first` gives it, and no elements."""
    parts = {path: x for path, x in walk(tree) if isinstance(x, ShardedParameter)}
    bare = replace_at(tree, {path: x.part.new_empty(x.shape, device="meta") for path, x in parts.items()})
    return tree_map(lambda x: x.to("meta"), bare)


def sum_grads_over_ranks(tree: T) -> T:
    """`fgpt.distributed.sum_over_ranks` of the leaves that every process holds whole: gradients of what is trained in
    parts are sums already.
    """
    if not has_sharded_parameters(tree):
        return distributed.sum_over_ranks(tree)
    whole, _ = _whole_and_parts(tree)
    return replace_at(tree, distributed.sum_over_ranks(whole))


def global_norm_over_ranks(tree: Any) -> Float[Tensor, ""]:
    """`fgpt.optim.global_norm` of a tree with leaves in parts, of all processes' parts."""
    whole, parts = _whole_and_parts(tree)
    squares = distributed.sum_over_ranks(square_norm([*parts.values()])) if parts else 0.0
    return (squares + square_norm([*whole.values()])).sqrt() if whole else torch.as_tensor(squares).sqrt()


def _whole_and_parts(tree: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The leaves by path: those that every process holds whole, and those that are this one's part."""
    nodes = [path for path, x in walk(tree) if isinstance(x, ShardedParameter)]
    in_parts = {path + separator + "part" for path in nodes for separator in "./"}
    whole: dict[str, Tensor] = {}
    parts: dict[str, Tensor] = {}
    for path, x in leaves(tree).items():
        (parts if path in in_parts else whole)[path] = x
    return whole, parts


def _gather(x: Any) -> Any:
    """The whole of a matrix that is in parts."""
    return gather(x).detach() if isinstance(x, ShardedParameter) else gather_rows(x)


def _on_host(tree: T) -> T:
    return tree_map(lambda x: x.cpu(), tree)
