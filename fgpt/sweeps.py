"""Many trainings as one: each member has its own adapters, hyperparameters, dropout and batches over one frozen base.

    states = stack_states([init_state(adapters, optimizer) for adapters in ..], optimizer)
    step = sweep_step(lambda h: make_step(loss, adamw(h["lr"])))
    for micro_batches in ..:                                        of each member
        states, metrics = step(states, params, stack_batches(micro_batches), seeds, {"lr": lrs})
    members = unstack_states(states, like)

The base is in memory once and multiplied with all members' rows at once. Each member takes the steps that it would take
alone, up to rounding: products with other numbers of rows add in another order. Dropout and noise are those of a member
alone where batches need no filling up: they are drawn by position, and padding moves positions.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import vmap

from fgpt.adapter_stacking import stack_adapters
from fgpt.errors import InputError
from fgpt.losses import Batch, at_all_positions, with_num_positions
from fgpt.optim import Optimizer
from fgpt.rng import fold_in
from fgpt.train_step import Key, Metrics, State, Step, init_state, micro_batch_seeds
from fgpt.tree import children, device, leaves, tree_map, unflatten_like

B = TypeVar("B")
Tree: TypeAlias = Any
Hyperparameters: TypeAlias = Mapping[str, Float[Tensor, "*members"]]
"""By name; of one member scalars."""
MemberSeeds: TypeAlias = Int[Tensor, " members"] | tuple[Int[Tensor, " members"], ...] | None
"""The seed of each member's step, or of each of its micro-batches: see `member_seeds`."""
SweepStep: TypeAlias = Callable[[State, Tree, Sequence[Any], MemberSeeds, Hyperparameters], tuple[State, Metrics]]


def stack_states(states: Sequence[State], optimizer: Optimizer) -> State:
    """States of several trainings as one, each leaf stacked along a new first axis.

    LoRAs may differ in rank and scale, as in `stack_adapters`: what is filled in is 0 and stays 0.

    Args:
        states: One or more, at any step.
        optimizer: What made their `opt_state`, with any hyperparameters.

    Raises:
        InputError: as `stack_adapters` does.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params, optimizer = fgpt.init(config, fgpt.key(0)), fgpt.adamw(0.1)
    >>> states = [fgpt.init_state(fgpt.lora(params, fgpt.key(0), rank), optimizer) for rank in (2, 4)]
    >>> stack_states(states, optimizer).trainable["blocks.0.attn.q"].a.shape
    torch.Size([2, 4, 8])
    """
    stacked = stack_adapters([state.trainable for state in states])
    padded: list[State] = []
    for i, state in enumerate(states):
        form = init_state(tree_map(lambda x, i=i: x[i], stacked), optimizer)
        known = leaves(state)
        new = [_pad(known[path], x.shape) if path in known else x for path, x in leaves(form).items()]
        padded.append(unflatten_like(form, new))
    return tree_map(lambda *xs: torch.stack(xs), *padded)


def unstack_states(stacked: State, like: Sequence[State]) -> list[State]:
    """The states of the members, each of the form that it has alone.

    Args:
        stacked: What `stack_states` returned, trained or not.
        like: A state of each member, at any step.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params, optimizer = fgpt.init(config, fgpt.key(0)), fgpt.adamw(0.1)
    >>> states = [fgpt.init_state(fgpt.lora(params, fgpt.key(0), rank), optimizer) for rank in (2, 4)]
    >>> first, _ = unstack_states(stack_states(states, optimizer), states)
    >>> first.trainable["blocks.0.attn.q"].a.shape
    torch.Size([2, 8])
    """
    by_path = leaves(stacked)
    members: list[State] = []
    for i, state in enumerate(like):
        member_leaves = [by_path[path][i][tuple(map(slice, x.shape))].clone() for path, x in leaves(state).items()]
        members.append(unflatten_like(state, member_leaves))
    return members


def take_members(stacked: Tree, members: Sequence[int]) -> Tree:
    """A stack of some members of a stack, in this order.

    >>> take_members({"w": torch.tensor([1.0, 2.0, 3.0])}, [2, 0])
    {'w': tensor([3., 1.])}
    """
    return tree_map(lambda x: x[list(members)], stacked)


def stack_batches(members: Sequence[Sequence[B]]) -> list[B]:
    """The micro-batches of each member's step as one list of micro-batches with a leading axis.

    Batches of other sizes are filled up with padding: rows, positions, loss positions and whole micro-batches, all of
    weight 0.

    Args:
        members: The micro-batches of each member: `Batch`es, or nodes that hold some.

    Raises:
        InputError: if nodes that hold batches differ in their rows, which their losses count.

    >>> import fgpt
    >>> short, long = torch.tensor([[1, 2]]), torch.tensor([[1, 2, 3]])
    >>> batches = [[fgpt.Batch(x, x, torch.ones(x.shape))] for x in (short, long)]
    >>> stack_batches(batches)[0].weights
    tensor([[[1., 1., 0.]],
    <BLANKLINE>
            [[1., 1., 1.]]])
    """
    count = max(map(len, members))
    if any(len(batches) < count and not isinstance(batches[0], Batch) for batches in members):
        raise InputError("the members of a sweep have other numbers of micro-batches: expected equally many rows")
    columns = [[batches[i] if i < len(batches) else _empty(batches[0]) for batches in members] for i in range(count)]
    return [_stack_column(column) for column in columns]


def _empty(batch: Any) -> Any:
    """A batch of weight 0 and of the shape of this one."""
    return replace(batch, weights=torch.zeros_like(batch.weights))


def _stack_column(batches: Sequence[Any]) -> Any:
    if isinstance(batches[0], Batch):
        filled: Sequence[Any] = _with_one_shape(batches)
    else:
        filled = batches
        for name, part in children(batches[0]):
            if isinstance(part, Batch):
                parts = [getattr(batch, name) for batch in filled]
                if len({len(x.tokens) for x in parts}) > 1:
                    raise InputError("the members of a sweep have batches of other rows: expected equally many")
                parts = _with_one_shape(parts)
                filled = [replace(batch, **{name: x}) for batch, x in zip(filled, parts, strict=True)]
    return tree_map(lambda *xs: torch.stack([_pad(x, _common_shape(xs)) for x in xs]), *filled)


def _with_one_shape(batches: Sequence[Batch]) -> list[Batch]:
    """The batches with rows, positions and loss positions of padding, so that all are of one shape."""
    rows, width = (max(batch.tokens.shape[axis] for batch in batches) for axis in (0, 1))
    filled = _with_equal_fields([_fill(batch, rows, width) for batch in batches])
    if all(batch.loss_positions is not None for batch in filled):
        most = max(batch.loss_positions.numel() for batch in filled if batch.loss_positions is not None)
        return [with_num_positions(batch, most) for batch in filled]
    return [at_all_positions(batch) for batch in filled]


def _fill(batch: Batch, rows: int, width: int) -> Batch:
    """The batch with rows and positions of padding after its own."""
    old_width = batch.tokens.shape[1]
    grids = {}
    for name in ("tokens", "targets", "weights", "segments"):
        x = getattr(batch, name)
        grids[name] = None if x is None else _pad(x, (rows, width))
    positions, bounds = batch.loss_positions, batch.cu_seqlens
    if positions is not None:
        positions = positions // old_width * width + positions % old_width
    if bounds is not None:  # the padding that a row had goes on: it is the last document
        bounds = torch.cat([bounds, bounds.new_full((len(bounds), 1), width)], 1)
        others = bounds.new_full((rows - len(bounds), bounds.shape[1]), width)
        others[:, :1] = 0
        bounds = torch.cat([bounds, others])
    return replace(batch, **grids, loss_positions=positions, cu_seqlens=bounds)


def _with_equal_fields(batches: Sequence[Batch]) -> list[Batch]:
    """Batches of one shape that all have segments or all have none, and bounds of documents likewise. A row without
    either is one document.
    """
    segments, bounds = [batch.segments for batch in batches], [batch.cu_seqlens for batch in batches]
    if any(x is not None for x in segments):
        segments = [_segments(batch) if batch.segments is None else batch.segments for batch in batches]
    room = max((x.shape[1] for x in bounds if x is not None), default=0)
    if room and all(x is not None or batch.segments is None for x, batch in zip(bounds, batches, strict=True)):
        rows, width = batches[0].tokens.shape
        whole = torch.tensor([[0, width]], dtype=torch.int32).expand(rows, 2)
        known = [whole.to(batch.tokens.device) if x is None else x for x, batch in zip(bounds, batches, strict=True)]
        bounds = [F.pad(x, (0, room - x.shape[1]), value=width) for x in known]
    else:  # segments alone say what a token sees
        bounds = [None] * len(batches)
    return [replace(b, segments=s, cu_seqlens=c) for b, s, c in zip(batches, segments, bounds, strict=True)]


def _segments(batch: Batch) -> Int[Tensor, "rows seq"]:
    """The document of each position, by the bounds of documents; without any a row is one."""
    if batch.cu_seqlens is None:
        return torch.ones_like(batch.tokens)
    position = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    return 1 + (position[None, :, None] >= batch.cu_seqlens[:, None, 1:]).sum(-1)


def _common_shape(xs: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(max(sizes) for sizes in zip(*(x.shape for x in xs), strict=True))


def _pad(x: Tensor, shape: Sequence[int]) -> Tensor:
    """`x` with zeros after its own elements, along each axis."""
    extra = [amount for size, new_size in zip(reversed(x.shape), reversed(shape)) for amount in (0, new_size - size)]
    return F.pad(x, extra) if any(extra) else x


def member_seeds(rngs: Sequence[Key], count: int, where: torch.device) -> MemberSeeds:
    """The seeds that the steps of trainings with these keys draw from, for each of `count` micro-batches.

    Args:
        rngs: The key of each member's step.
        count: The most micro-batches of a member.
        where: The device.
    """
    of_each = [micro_batch_seeds(rng, count, where) for rng in rngs]
    return tuple(torch.stack(column) for column in zip(*of_each, strict=True))


def sweep_step(step_for: Callable[[Hyperparameters], Step]) -> SweepStep:
    """The step of all members: `step(states, frozen, batches, seeds, hyperparameters) -> (states, metrics)`, where all
    but `frozen` have a leading axis of members.

    Args:
        step_for: The step of one member, from its hyperparameters as scalar tensors, such as
            `lambda h: make_step(loss, adamw(h["lr"], weight_decay=h["weight_decay"]))`.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params, optimizer = fgpt.init(config, fgpt.key(0)), fgpt.adamw(0.1)
    >>> states = [fgpt.init_state(fgpt.lora(params, fgpt.key(0), rank), optimizer) for rank in (2, 4)]
    >>> text = torch.tensor([[1, 2, 3, 4]])
    >>> batch = fgpt.Batch(text[:, :-1], text[:, 1:], torch.ones(1, 3))
    >>> def loss(adapters, params, batch, seed):
    ...     return fgpt.nll(fgpt.adapt(params, adapters), batch)
    >>> step = sweep_step(lambda h: fgpt.make_step(loss, fgpt.adamw(h["lr"])))
    >>> batches, lrs = stack_batches([[batch], [batch]]), torch.tensor([0.1, 0.01])
    >>> stacked, metrics = step(stack_states(states, optimizer), params, batches, None, {"lr": lrs})
    >>> metrics.loss.shape, stacked.step
    (torch.Size([2]), tensor([1, 1]))
    """

    def step(
        states: State,
        frozen: Tree,
        batches: Sequence[Any],
        seeds: MemberSeeds,
        hyperparameters: Hyperparameters,
    ) -> tuple[State, Metrics]:
        def member(state: State, member_batches: Any, seed: Any, h: Hyperparameters) -> tuple[State, Metrics]:
            return step_for(h)(state, frozen, member_batches, seed)

        in_dims = (0, 0, None if seeds is None else 0, 0)
        return vmap(member, in_dims=in_dims)(states, list(batches), seeds, dict(hyperparameters))

    return step


class SweepResult(NamedTuple):
    """What a sweep leaves.

    Args:
        states: The state of each member, of the form that it has alone.
        losses: The loss of each before each of its steps, in nats per weighted token.

    >>> SweepResult([], torch.zeros(2, 3)).losses.shape
    torch.Size([2, 3])
    """

    states: list[State]
    losses: Float[Tensor, "members steps"]


def sweep(
    step_for: Callable[[Hyperparameters], Step],
    states: Sequence[State],
    frozen: Tree,
    batches: Iterable[Sequence[Sequence[Any]]],
    *,
    optimizer: Optimizer,
    hyperparameters: Hyperparameters,
    rngs: Sequence[Key] | None = None,
) -> SweepResult:
    """Train several members at once, each as it would be trained alone.

    Args:
        step_for: The step of one member, see `sweep_step`.
        states: The state of each member before its first step; ranks and scales of LoRAs may differ.
        frozen: What no member changes, such as the base.
        batches: For each step, the micro-batches of each member; as many steps are taken.
        optimizer: What made the states, with any hyperparameters.
        hyperparameters: By name, a value for each member.
        rngs: The key of each member, folded with the number of each step; None draws nothing.

    Raises:
        InputError: as `stack_states` and `stack_batches` do.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params, optimizer = fgpt.init(config, fgpt.key(0)), fgpt.adamw(0.1)
    >>> states = [fgpt.init_state(fgpt.lora(params, fgpt.key(i), rank=2), optimizer) for i in range(2)]
    >>> text = torch.tensor([[1, 2, 3, 4]])
    >>> batch = fgpt.Batch(text[:, :-1], text[:, 1:], torch.ones(1, 3))
    >>> def loss(adapters, params, batch, seed):
    ...     return fgpt.nll(fgpt.adapt(params, adapters, rng=seed), batch)
    >>> result = sweep(
    ...     lambda h: fgpt.make_step(loss, fgpt.adamw(h["lr"])),
    ...     states,
    ...     params,
    ...     [[[batch], [batch]]] * 5,
    ...     optimizer=optimizer,
    ...     hyperparameters={"lr": torch.tensor([0.1, 0.01])},
    ... )
    >>> result.losses.shape, len(result.states)
    (torch.Size([2, 5]), 2)
    """
    stacked, step, columns = stack_states(states, optimizer), sweep_step(step_for), []
    where = device(stacked.trainable)
    for i, members in enumerate(batches):
        stacked_batches = stack_batches(members)
        keys = None if rngs is None else [fold_in(rng, i) for rng in rngs]
        seeds = None if keys is None else member_seeds(keys, len(stacked_batches), where)
        stacked, metrics = step(stacked, frozen, stacked_batches, seeds, hyperparameters)
        columns.append(metrics.loss.detach())
    losses = torch.stack(columns, 1) if columns else torch.zeros(len(states), 0)
    return SweepResult(unstack_states(stacked, states), losses)
