"""A training step as a pure function."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import grad_and_value

from fgpt import distributed
from fgpt.distributed import ALONE, World
from fgpt.errors import InputError
from fgpt.kernels import leaf_lists
from fgpt.kernels.compilation import compile_or_warn
from fgpt.kernels.cuda_graphs import is_capturing
from fgpt.kernels.functorch_state import in_transform_or_compile, is_differentiated, is_mapped, is_one_vmap
from fgpt.kernels.sharded_parameter import has_sharded_parameters
from fgpt.optim import Optimizer, clip_factor, global_norm
from fgpt.rng import fold_in, seed_tensor
from fgpt.sharding import global_norm_over_ranks, has_sharded, is_tensor_parallel, sum_grads_over_ranks
from fgpt.tree import device, node, tree_leaves, tree_map, unflatten_like

UNCOMPILED = "a step with compile=True runs uncompiled when it is mapped over or differentiated"

Tree: TypeAlias = Any
Loss: TypeAlias = Callable[[Tree, Tree, Any, Int[Tensor, ""] | None], tuple[Float[Tensor, ""], Float[Tensor, ""]]]
"""(trainable, frozen, batch, seed) -> (Σ weight · nll, Σ weight). A batch is a `Batch`, or the objective's own tree."""


@node
class State:
    """What a step updates.

    Args:
        trainable: The tree that is trained, such as adapters.
        opt_state: The state of its optimizer.
        step: The number of steps so far, an integer.

    >>> import fgpt
    >>> state = fgpt.init_state({"w": torch.zeros(2)}, fgpt.adamw(0.1))
    >>> state.trainable, state.step
    ({'w': tensor([0., 0.])}, tensor(0))
    """

    trainable: Tree
    opt_state: Tree
    step: Int[Tensor, ""]


@node
class Metrics:
    """What a step reports, of all its micro-batches together.

    Args:
        loss: The mean loss before the update, in nats per weighted token.
        grad_norm: The Euclidean norm of the gradient, before clipping.
        weight: The total weight of the tokens; their number, if each weighs 1.
        others: Further figures of a step by name, such as rewards.

    >>> metrics = Metrics(loss=torch.tensor(2.0), grad_norm=torch.tensor(0.5), weight=torch.tensor(128.0))
    >>> metrics.loss.exp()  # the perplexity
    tensor(7.3891)
    """

    loss: Float[Tensor, ""]
    grad_norm: Float[Tensor, ""]
    weight: Float[Tensor, ""]
    others: dict[str, Float[Tensor, ""]] | None = None


Gradient: TypeAlias = Callable[[Loss, Tree, Tree, Any, Int[Tensor, ""] | None], tuple[Tree, tuple[Tensor, Tensor]]]
"""(loss, trainable, frozen, batch, seed) -> (gradient, (Σ weight · nll, Σ weight)), sums over the batch."""
Finish: TypeAlias = Callable[[Tree, Tensor, Int[Tensor, ""] | None], tuple[Tree, Tensor]]
"""(Σ gradient, Σ weight, seed) of a whole step -> (sum, divisor): what the optimizer gets is their quotient."""
Key: TypeAlias = torch.Generator | Int[Tensor, ""]
"""A key or its seed."""
Seeds: TypeAlias = tuple[Int[Tensor, ""], ...]
"""The `micro_batch_seeds` of a key, which the steps of `make_step` take in its place."""
Step: TypeAlias = Callable[[State, Tree, Sequence[Any], Key | None], tuple[State, Metrics]]


def init_state(trainable: Tree, optimizer: Optimizer) -> State:
    """The state before the first step.

    Args:
        trainable: The tree to train, such as adapters.
        optimizer: Such as `adamw(lr)`.

    Raises:
        InputError: for `muon` or `adamw8bit` of what is trained in parts.

    >>> import fgpt
    >>> init_state({"w": torch.zeros(2)}, fgpt.adamw(0.1)).step
    tensor(0)
    """
    if has_sharded_parameters(trainable) and not optimizer.is_elementwise:
        raise InputError("muon and adamw8bit are of whole matrices and blocks, and these are in parts: expected adamw")
    step = torch.zeros((), dtype=torch.int64, device=device(trainable))
    return State(trainable, optimizer.init(trainable), step)


def value_and_grad_once(
    fn: Callable[..., tuple[Tensor, Tensor]], tree: Tree, *args: Any
) -> tuple[Tree, tuple[Tensor, Tensor]]:
    """grad_and_value(fn, has_aux=True)(tree, *args), if nobody differentiates the result: equal to the bit, and up to
    rounding if rows are scaled (DoRA, IA3), which plain autograd does in another order, or if large fp32 matrices are
    multiplied on an AMD CPU.

    torch.func.grad keeps the graph of its own backward for a second one: 1.06 GB against 0.73 GB above the model in a
    LoRA step of GPT-2 small on 1,024 tokens. Plain autograd frees each activation once it is used.
    """
    with torch.enable_grad():
        inputs = tree_map(lambda x: x.detach().requires_grad_(), tree)
        value, aux = fn(inputs, *args)
    grads = torch.autograd.grad(value, tree_leaves(inputs), materialize_grads=True)
    return unflatten_like(inputs, grads), (value.detach(), aux.detach())


class _MappedCall:
    """A function of the leaves of its arguments that vmap maps over; all others are constants.

    Args:
        fn: A function of the arguments.
        args: The arguments; the first one is what is differentiated.
    """

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
        arguments = tree_leaves(args)
        self._fn, self._args = fn, args
        self._positions = [i for i, x in enumerate(arguments) if isinstance(x, Tensor) and is_mapped(x)]
        self.mapped = [arguments[i] for i in self._positions]
        self._constants = [None if i in self._positions else x for i, x in enumerate(arguments)]
        self.num_differentiated = len(tree_leaves(args[0]))
        """They come first."""

    def __call__(self, *mapped: Tensor) -> Any:
        arguments = list(self._constants)
        for i, x in zip(self._positions, mapped, strict=True):
            arguments[i] = x
        return self._fn(*unflatten_like(self._args, arguments))


class _MappedOnce(torch.autograd.Function):
    """`value_and_grad_once` under one vmap: (call, *mapped leaves) -> the gradient, value and aux.

    The gradient of Σ_m value_m in each member's leaves is that member's gradient. So plain autograd differentiates the
    mapped function, where torch.func.grad, inside vmap, would keep the graph of its backward for a second one.
    """

    @staticmethod
    def forward(*_: Any) -> Any:
        raise RuntimeError("outside vmap it is value_and_grad_once")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Any, *leaves: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        axes, count = in_dims[1:], call.num_differentiated
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() if i < count else x for i, x in enumerate(leaves)]
            value, aux = torch.func.vmap(call, in_dims=axes, randomness=info.randomness)(*inputs)
            total = value.sum()
        grads = torch.autograd.grad(total, inputs[:count], materialize_grads=True)
        return (*grads, value.detach(), aux.detach()), (*axes[:count], 0, 0)


def mapped_value_and_grad_once(
    fn: Callable[..., tuple[Tensor, Tensor]], tree: Tree, *args: Any
) -> tuple[Tree, tuple[Tensor, Tensor]]:
    """`value_and_grad_once` under one vmap that maps over every leaf of `tree`."""
    call = _MappedCall(fn, (tree, *args))
    *grads, value, aux = _MappedOnce.apply(call, *call.mapped)  # pyright: ignore[reportGeneralTypeIssues]
    return unflatten_like(tree, grads), (value, aux)


def value_and_grad_of_member(
    fn: Callable[..., tuple[Tensor, Tensor]], tree: Tree, *args: Any
) -> tuple[Tree, tuple[Tensor, Tensor]]:
    """grad_and_value(fn, has_aux=True)(tree, *args) of one member of a vmap over `tree`: by plain autograd of all
    members at once, if no other transform is around it and nobody differentiates the result.
    """
    operands = [x for x in tree_leaves((tree, *args)) if isinstance(x, Tensor)]
    if is_one_vmap() and all(map(is_mapped, tree_leaves(tree))) and not is_differentiated(*operands):
        return mapped_value_and_grad_once(fn, tree, *args)
    return grad_and_value(fn, has_aux=True)(tree, *args)  # pyright: ignore[reportReturnType]


def _differentiable_value_and_grad(
    fn: Callable[..., tuple[Tensor, Tensor]], tree: Tree, *args: Any
) -> tuple[Tree, tuple[Tensor, Tensor]]:
    """The same, if plain autograd differentiates the result."""
    inputs = tree_map(lambda x: x.view_as(x) if x.requires_grad else x.detach().requires_grad_(), tree)
    value, aux = fn(inputs, *args)
    grads = torch.autograd.grad(value, tree_leaves(inputs), create_graph=True, materialize_grads=True)
    return unflatten_like(inputs, grads), (value, aux)


def value_and_grad(
    fn: Callable[..., tuple[Tensor, Tensor]], tree: Tree, *args: Any
) -> tuple[Tree, tuple[Tensor, Tensor]]:
    """(gradient, (value, aux)) of fn(tree, *args) = (value, aux), under any transform, the cheapest way that serves."""
    if in_transform_or_compile():
        return value_and_grad_of_member(fn, tree, *args)
    return (_differentiable_value_and_grad if _requires_grad((tree, *args)) else value_and_grad_once)(fn, tree, *args)


def _check_result(loss: Loss) -> Loss:
    """`loss`, which raises InputError if it returns anything but two scalar tensors."""

    def call(*args: Any) -> tuple[Tensor, Tensor]:
        result: Any = loss(*args)
        is_pair = isinstance(result, tuple) and len(result) == 2
        is_pair = is_pair and all(isinstance(x, Tensor) and x.ndim == 0 for x in result)
        if not is_pair or not result[0].is_floating_point():
            raise InputError(
                "the loss of make_step(loss, ..) returns two scalar tensors, (Σ weight · nll, Σ weight), as fgpt.nll "
                f"does; got {_describe(result)}"
            )
        return result

    return call


def _describe(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"a {str(x.dtype).removeprefix('torch.')} tensor of shape {list(x.shape)}"
    if isinstance(x, tuple | list):
        return f"a {type(x).__name__} of {len(x)} ({', '.join(map(_describe, x[:4]))})"
    return f"a {type(x).__name__}"


def _requires_grad(args: tuple[Any, ...]) -> bool:
    """Whether plain autograd records what is computed from `args`."""
    return torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in tree_leaves(args))


def micro_batch_seeds(rng: Key | Seeds, count: int, where: torch.device) -> Seeds:
    """The seed of each micro-batch of a step, on the device of what is trained.

    Raises InputError in the capture of a CUDA graph, if the seeds would be constants there: each replay would draw one
    and the same dropout.

    Args:
        rng: The key of the step. Seeds stay themselves.
        count: How many micro-batches it has.
        where: The device.
    """
    if isinstance(rng, tuple):
        return rng
    if is_capturing() and not (isinstance(rng, Tensor) and rng.device == where):
        raise InputError(
            "the key of a step that a CUDA graph captures: expected a seed tensor on the device, which may change "
            "between replays, such as fold_in(seed_tensor(key, device), state.step); got "
            f"{'a seed on ' + str(rng.device) if isinstance(rng, Tensor) else 'a Generator'}"
        )
    return tuple(seed_tensor(fold_in(rng, i), where) for i in range(count))


def _without_value(loss: Loss) -> Loss:
    """`loss`, with sums and gradients of 0."""

    def call(*args: Any) -> tuple[Tensor, Tensor]:
        value, weight = loss(*args)
        return 0 * value, 0 * weight

    return call


def _no_sums(trainable: Tree) -> tuple[Tree, Tensor, Tensor]:
    """Those of no micro-batch."""
    zero = torch.zeros((), device=device(trainable))
    return tree_map(torch.zeros_like, trainable), zero, zero


def make_step(
    loss: Loss,
    optimizer: Optimizer,
    *,
    max_norm: float | None = 1.0,
    prepare: Callable[[Tree, Tree], Tree] | None = None,
    gradient: Gradient | None = None,
    finish: Finish | None = None,
    world: World = ALONE,
    compile: bool = False,
) -> Step:
    """`step(state, frozen, batches, rng) -> (state, metrics)`: one update from one or more micro-batches.

    The gradients of the sums are added and divided once by the total weight, so that k micro-batches of different
    lengths give the gradient of their union. Only `state.trainable` is differentiated. Each micro-batch gets its own
    seed from `rng`; give each step a fresh key. A step mapped over draws the same dropout for every member from one
    key, and different dropout from a mapped seed: `rng=fold_in(key, i)` with i mapped.

    A step can be mapped over and differentiated. Plain autograd records it if one of its arguments requires grad, so
    detach those that should not be differentiated.

    Args:
        loss: `loss(trainable, frozen, batch, seed) -> (Σ weight · nll, Σ weight)`, two scalar tensors.
        optimizer: Such as `adamw(lr)`.
        max_norm: Clip the gradient to this global norm; None does not clip.
        prepare: `prepare(trainable, frozen)` is computed once a step, a constant to its gradient, and the loss gets it
            in place of `frozen`. None gives it `frozen` itself.
        gradient: `gradient(loss, trainable, frozen, batch, seed) -> (grads, (Σ weight · nll, Σ weight))` of a
            micro-batch, a sum over it, in place of that of its loss: see `fgpt.transforms.step_gradients`.
        finish: `finish(grads, weight, seed) -> (grads, divisor)` of the sums over all micro-batches, before they are
            divided and clipped, such as noise on them and another divisor than their weight: see
            `fgpt.transforms.privacy`.
        world: The processes that share the step, `fgpt.world()`. Each is given all micro-batches of the update,
            computes the gradients of its own, of which there may be none, and ends with the same state: see
            `fgpt.distributed`.
        compile: Compile the gradient whole, for micro-batches of one shape (needs a C++ compiler). Each other shape
            compiles it again: where shapes vary, let `loss` compile the blocks instead, by `nll(.., compile=True)`.
            Under vmap and derivatives of the step it has no effect, and a warning says so, as it does if torch cannot
            compile the loss.

    Raises:
        InputError: from the step, if `loss` returns anything else, for a `world` over a tensor-parallel base, and for
            parameters in parts without a `world`, or with another gradient; and for a `gradient` that is to be
            compiled.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params, optimizer = fgpt.init(config, fgpt.key(0)), fgpt.adamw(0.01)
    >>> text = torch.tensor([[1, 2, 3, 4]])
    >>> batch = fgpt.Batch(text[:, :-1], text[:, 1:], torch.ones(1, 3))
    >>> def loss(adapters, params, batch, seed):
    ...     return fgpt.nll(fgpt.adapt(params, adapters, rng=seed), batch)
    >>> step = fgpt.make_step(loss, optimizer)
    >>> state, losses = fgpt.init_state(fgpt.lora(params, fgpt.key(1), rank=2), optimizer), []
    >>> for i in range(3):
    ...     state, metrics = step(state, params, [batch], fgpt.fold_in(fgpt.key(2), i))
    ...     losses.append(float(metrics.loss))
    >>> state.step, metrics.weight, losses[2] < losses[0]
    (tensor(3), tensor(3.), True)
    """
    loss = _check_result(loss)
    compute: Any = value_and_grad if gradient is None else gradient
    if compile:
        if gradient is not None:
            raise InputError(
                "compile=True compiles the gradient of the loss, and not another one: leave one of them out"
            )
        transformable: Any = grad_and_value(loss, has_aux=True)
        once: Any = partial(value_and_grad_once, loss)
        compiled = compile_or_warn(transformable, "the gradient", fallback=once, dynamic=False)

        def compiled_or_not(term: Loss, *args: Any) -> Any:
            if term is not loss:  # without its value, of a micro-batch that is another process's
                return value_and_grad(term, *args)
            if not (in_transform_or_compile() or _requires_grad(args)):
                return compiled(*args)
            warnings.warn(UNCOMPILED, stacklevel=3)
            return value_and_grad(loss, *args)

        compute = compiled_or_not

    def step(
        state: State, frozen: Tree, batches: Sequence[Tree], rng: Key | Seeds | None = None
    ) -> tuple[State, Metrics]:
        where = device(state.trainable)
        if world.size > 1 and is_tensor_parallel(frozen):
            raise InputError("over a tensor-parallel base all processes take the same examples: leave out world=")
        # A process by itself has no parts: it is spared the walk over the tree.
        trains_parts = distributed.world().size > 1 and has_sharded_parameters(state.trainable)
        if trains_parts and (world.size == 1 or gradient is not None or finish is not None):
            raise InputError(
                "gradients of parameters in parts are sums over all processes: expected world=fgpt.world(), and no "
                "gradient= or finish="
            )
        if prepare is not None:
            frozen = prepare(state.trainable, frozen)
        seeds = [None] * len(batches) if rng is None else micro_batch_seeds(rng, len(batches), where)
        share = [(loss, *x) for x in world.share([*zip(batches, seeds, strict=True)])]
        in_parts = world.size > 1 and (has_sharded(frozen) or trains_parts)
        if in_parts and len(share) < -(-len(batches) // world.size):
            share.append((_without_value(loss), batches[0], seeds[0]))  # the others multiply with this one's parts
        if share:
            (first, batch, seed), *share = share
            grads, (value, weight) = compute(first, state.trainable, frozen, batch, seed)
        else:
            grads, value, weight = _no_sums(state.trainable)
        for term, batch, seed in share:
            more, (v, w) = compute(term, state.trainable, frozen, batch, seed)
            total = leaf_lists.add(tree_leaves(grads), tree_leaves(more))
            grads, value, weight = unflatten_like(grads, total), value + v, weight + w
        if world.size > 1:
            grads, value, weight = sum_grads_over_ranks((grads, value, weight))
        # A batch that has lost all its rows changes nothing.
        divisor = weight_or_one = torch.where(weight == 0, 1, weight)
        if finish is not None:
            grads, divisor = finish(grads, weight, None if seeds[0] is None else fold_in(seeds[0], "finish"))
        norm = (global_norm_over_ranks if in_parts else global_norm)(grads) / divisor
        divisor = divisor if max_norm is None else divisor / clip_factor(norm, max_norm)
        grads = unflatten_like(grads, leaf_lists.divide(tree_leaves(grads), divisor))
        trainable, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        return State(trainable, opt_state, state.step + 1), Metrics(value / weight_or_one, norm, weight)

    return step
