"""An optimizer whose state is in parts: each of N processes holds that of 1 / N of the rows of every leaf.

    θ_r, state_r = update(g_r, state_r, θ_r)        of rows r n to (r + 1) n of each leaf, n = ⌈rows / N⌉
    θ            = all_gather_r(θ_r)

An optimizer that treats each element alone gives the same bits as without parts. AdamW's 8 bytes for a parameter in
fp32 become 8 / N; parameters and gradients every process has whole.

Source: Rajbhandari et al. 2020 (ZeRO), section 5.1: stage 1.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fgpt import distributed
from fgpt.distributed import World
from fgpt.errors import InputError
from fgpt.kernels.sharded_matrix import all_gather, fill_rows, row_range
from fgpt.kernels.sharded_parameter import has_sharded_parameters
from fgpt.optim import Optimizer
from fgpt.tree import tree_leaves, tree_map, unflatten_like

T = TypeVar("T")


def zero_redundancy(optimizer: Optimizer, *, world: World | None = None) -> Optimizer:
    """`optimizer`, whose state each process holds for its rows of each leaf alone.

    Its gradients are sums over all processes, as `make_step(.., world=fgpt.world())` gives them, and all processes call
    it together. A state is saved whole, and read on any number of processes, by `gather_state` and `split_state`.

    Args:
        optimizer: One that treats each element alone: `adamw`, `schedule_free_adamw`, an average of one.
        world: The processes and which one this is; None is the default group of torch.distributed.

    Returns:
        An optimizer; of a process by itself, `optimizer` as it is.

    Raises:
        InputError: for an optimizer of whole matrices or blocks, which are `muon` and `adamw8bit`; and from `init`, for
            parameters that are in parts themselves.

    Source: Rajbhandari et al. 2020 (ZeRO), section 5.1.

    >>> import fgpt
    >>> half = zero_redundancy(fgpt.adamw(0.1), world=fgpt.World(rank=0, size=2))
    >>> half.init({"w": torch.ones(4, 3)}).mu["w"].shape
    torch.Size([2, 3])
    """
    here = distributed.world() if world is None else world
    if here.size == 1:
        return optimizer
    if not optimizer.is_elementwise:
        raise InputError("the state of muon and adamw8bit is of whole matrices and blocks: expected adamw")

    def init(params: Any) -> Any:
        if has_sharded_parameters(params):
            raise InputError("the state of what is trained in parts is in parts already: leave out zero_redundancy")
        return optimizer.init(_split(params, here))

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        parts, state = optimizer.update(_split(grads, here), state, _split(params, here))
        return _gather(parts, params, here), state

    def evaluation_params(state: Any, params: Any) -> Any:
        return _gather(optimizer.evaluation_params(state, _split(params, here)), params, here)

    return Optimizer(init, update, evaluation_params)


def split_state(optimizer: Optimizer, state: T, params: Any, *, world: World | None = None) -> T:
    """The part of this process of a whole state.

    Args:
        optimizer: The one that `zero_redundancy` was given.
        state: Its state of `params`.
        params: The whole trainable tree.
        world: As in `zero_redundancy`.

    >>> import fgpt
    >>> params = {"w": torch.ones(4, 3)}
    >>> state = fgpt.adamw(0.1).init(params)
    >>> split_state(fgpt.adamw(0.1), state, params, world=fgpt.World(rank=1, size=2)).mu["w"].shape
    torch.Size([2, 3])
    """
    here = distributed.world() if world is None else world
    return _map_parts(lambda x, like: _part(x, here), state, optimizer, params)


def gather_state(optimizer: Optimizer, state: T, params: Any, *, world: World | None = None) -> T:
    """The whole state, by the parts of all processes, each of which must call it. `split_state` is its inverse."""
    here = distributed.world() if world is None else world
    return _map_parts(lambda x, like: _gather(x, like, here), state, optimizer, params)


def _map_parts(fn: Callable[[Tensor, Tensor], Tensor], state: T, optimizer: Optimizer, params: Any) -> T:
    """`fn(x, a tensor of the whole's shape)` of the leaves of a state that are in parts: those that have another row if
    the params have one more.
    """
    of_whole: Any = tree_map(lambda x: x.to("meta"), params)
    longer = tree_map(lambda x: x.new_empty(len(x) + 1, *x.shape[1:]) if x.ndim else x, of_whole)
    triples = zip(tree_leaves(state), tree_leaves(optimizer.init(of_whole)), tree_leaves(optimizer.init(longer)))
    return unflatten_like(state, [fn(x, w) if w.shape != more.shape else x for x, w, more in triples])


def _split(tree: T, here: World) -> T:
    return tree_map(lambda x: _part(x, here), tree)


def _part(x: Tensor, here: World) -> Tensor:
    """The rows of this process, and rows of zeros where the last parts have fewer; a scalar every process has."""
    if not x.ndim:
        return x
    return fill_rows(x[row_range(len(x), here.rank, here.size)], -(-len(x) // here.size))


def _gather(parts: T, like: Any, here: World) -> T:
    """The whole leaves, in one message, of their bytes as they are."""
    local = [(x.contiguous(), whole) for x, whole in zip(tree_leaves(parts), tree_leaves(like), strict=True)]
    rows = [x.view(torch.uint8).flatten() for x, _ in local if x.ndim]
    if not rows:
        return parts
    message = torch.cat(rows)
    everyone = message.new_empty(here.size, len(message))
    all_gather(everyone.flatten(), message)
    columns = iter(everyone.split([len(x) for x in rows], dim=1))
    return unflatten_like(parts, [_join(next(columns), x, whole) if x.ndim else x for x, whole in local])


def _join(columns: Tensor, part: Tensor, whole: Tensor) -> Tensor:
    """The rows of all processes, of the type of one's, without those that fill the last ones."""
    return torch.cat([*columns]).view(part.dtype).view(-1, *part.shape[1:])[: len(whole)]
