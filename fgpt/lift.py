"""Any `nn.Module` as a params tree and a pure function of it, for models that fgpt does not have; and a function of a
tree as an `nn.Module`, for libraries that take nothing else.

    params, apply = from_module(module)        apply(params, x) == module(x)
    module = as_module(fn, tree)               module(x) == fn(tree, x)

`from_module` merges weights. Its paths are the module's own names. Weights are [out, in] here as everywhere:

transformer.h.3.attn.c_attn          a layer: nn.Linear, transformers' Conv1D (transposed), nn.Embedding
transformer.h.3.attn.c_attn.w        its weight, whose name in the module ends in .weight
encoder.self_attn.in_proj_weight     a matrix in no such layer: a layer by itself, with the rows of the module
transformer.h.3.ln_1.weight          any other parameter: a leaf
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from fgpt.errors import InputError
from fgpt.kernels.quantized_linear import FROZEN
from fgpt.model import Embedding, Linear
from fgpt.tree import children, leaves, node, tree_leaves, walk
from fgpt.weights import Adapted, Weight, dense

RECOMPUTES = (
    "the module recomputes activations in the backward, when its own parameters are back in place, so that gradients "
    "would be those of another model: turn its activation checkpointing off"
)


@node
class Matrix:
    """A parameter of two dimensions outside of any layer: it can be adapted and quantized like a layer's weight."""

    w: Weight


class Place(NamedTuple):
    """The parameter of the module that a leaf of the tree stands for."""

    names: tuple[str, ...]
    """Its name, and the names that it is tied to."""
    shape: torch.Size
    transposed: bool
    """Whether it is [in, out] in the module."""


def from_module(module: nn.Module) -> tuple[dict[str, Any], Callable[..., Any]]:
    """`(params, apply)` with `apply(params, *args, **kwargs)` = `module(*args, **kwargs)`, a function of `params`.

    `params` shares the module's memory and does not require grad, even if the module's parameters do; the module is not
    changed. `lora`, `dora`, `ia3`, `trainable_leaves`, `adapt`, `merge` and `quantize` work on `params` by path. A
    parameter with several names is one leaf, at the first of them: GPT-2's head is `transformer.wte`, and an adapter
    there changes both.

    `apply` merges every weight: each call computes an adapted weight and dequantizes a quantized one, autograd keeps
    both for the backward, and the gradient of each is as large as the weight (under vmap, for each example). LoRA's
    dropout cannot be merged, and is refused.

    Apart from its parameters, the module is used as it is when `apply` is called. In training mode its dropout uses
    torch's global generator (`vmap` then needs `randomness=`): call `module.eval()` first for a function of the
    arguments alone. Buffers are copied at each call, and changes to them are dropped: BatchNorm in training mode uses
    the statistics of the batch and updates none. During a call its tensors are in the module: one thread at a time. The
    module's kernels are its own; torch's attention has no second derivatives, transformers' "eager" one has them.
    Activation checkpointing is refused, but torch's checkpoint with `use_reentrant=True` is not noticed.

    Args:
        module: An ordinary module, whose parameters are floating-point and have a shape.

    Raises:
        InputError: if `module` is not an ordinary module, or has parameters that are not floating-point, have no shape
            yet, or are changed by the forward pass; and from `apply`, if `params` is not a tree of this module, or the
            module checkpoints activations (torch.utils.checkpoint).

    >>> import fgpt
    >>> module = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> params, apply = fgpt.from_module(module)
    >>> x = torch.randn(2, 4)
    >>> bool((apply(params, x) == module(x)).all())
    True
    """
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule | nn.DataParallel):
        raise InputError(f"from_module expects an ordinary nn.Module, got {type(module).__name__}")
    for name, x in module.named_parameters():
        _check_parameter(name, x)
    params: dict[str, Any] = {}
    places: dict[str, Place] = {}
    for path, x, new_places in _parts(module):
        _insert(params, path, x)
        places |= new_places

    def apply(params: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = _tensors(params, places, type(module).__name__)
        copies = {id(x): x.clone() for x in module.buffers()}
        buffers = {name: copies[id(x)] for name, x in _names(module, nn.Module.named_buffers)}
        if any(part.training and getattr(part, "gradient_checkpointing", False) for part in module.modules()):
            raise InputError(RECOMPUTES)  # transformers' flag: torch's older checkpoint uses no hooks
        try:
            with _no_recomputation():
                return torch.func.functional_call(module, tensors | buffers, args, kwargs, tie_weights=False)
        except RuntimeError as err:
            if RECOMPUTES in str(err):
                raise InputError(RECOMPUTES) from None
            raise

    return params, apply


# ------------------------------------------------------------------------------------------------------ module to tree


def _check_parameter(name: str, x: Tensor) -> None:
    if is_lazy(x):
        raise InputError(f"parameter {name} has no shape yet: call the module once before from_module")
    if not x.is_floating_point():
        raise InputError(
            f"parameter {name} is {x.dtype}, expected a floating dtype: use the plain module, then quantize its params"
        )


def _names(module: nn.Module, named: Callable[..., Iterable[tuple[str, Tensor]]]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by every name, those of a module with several names by its first: if torch's functional_call puts a
    tensor in one place under two names (as its `tie_weights` does), it does not restore the module's own.
    """
    for path, part in module.named_modules():
        yield from named(part, path, recurse=False, remove_duplicate=False)


def _parts(module: nn.Module) -> Iterator[tuple[str, Any, dict[str, Place]]]:
    """(path, layer or leaf, its places by the paths of its leaves), for every parameter under its first name."""
    named, tied = dict(module.named_parameters()), {}
    for name, x in _names(module, nn.Module.named_parameters):
        tied[id(x)] = (*tied.get(id(x), ()), name)

    def place(x: nn.Parameter, transposed: bool = False) -> Place:
        return Place(tied[id(x)], x.shape, transposed)

    for path, part in module.named_modules():
        if getattr(part, "max_norm", None) is not None:
            raise InputError(
                f"{path or 'the module'} has max_norm, which changes its table at each call: set it to None"
            )
        prefix, transposed = f"{path}." if path else "", isinstance(part, _conv1d())
        direct = {name: named[prefix + name] for name in part._parameters if prefix + name in named}
        if path and _is_layer(part, direct):
            w, b = direct["weight"], direct.get("bias")
            places = {f"{path}.w": place(w, transposed)}
            if b is not None:
                places[f"{path}.b"] = place(b)
            w, b = w.detach(), None if b is None else b.detach()
            w = w.T if transposed else w
            yield path, Embedding(w) if isinstance(part, nn.Embedding) else Linear(w, b), places
            continue
        for name, x in direct.items():
            leaf_path = prefix + name
            if x.ndim == 2:
                yield leaf_path, Matrix(x.detach()), {f"{leaf_path}.w": place(x)}
            else:
                yield leaf_path, x.detach(), {leaf_path: place(x)}


def _is_layer(part: nn.Module, direct: dict[str, nn.Parameter]) -> bool:
    """Whether `part` is one of the known layers and nothing else. A subclass with more parameters, and a layer whose
    bias is elsewhere (which IA3 would have to scale), become separate matrices and leaves.
    """
    names = {name for name, x in part._parameters.items() if x is not None}
    complete = names == direct.keys() and {"weight"} <= names <= {"weight", "bias"} and not part._modules
    return complete and isinstance(part, (nn.Linear, nn.Embedding, *_conv1d()))


def _conv1d() -> tuple[type, ...]:
    """transformers' Conv1D, if transformers is imported: without it no module has one."""
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return (conv1d,) if isinstance(conv1d, type) else ()


def _insert(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value


# ------------------------------------------------------------------------------------------------------ tree to module


def _tensors(params: Any, places: dict[str, Place], module: str) -> dict[str, Tensor]:
    """The module's parameters by each of their names, in the module's layout."""
    weights = dict(_weights(params))
    if missing := [path for path in places if path not in weights]:
        raise InputError(f"no '{missing[0]}' in these params: expected a tree of this {module} from from_module")
    if surplus := [path for path in weights if path not in places]:
        raise InputError(f"'{surplus[0]}' is not a parameter of this {module}: expected a tree from from_module")
    tensors: dict[str, Tensor] = {}
    for path, place in places.items():
        tensors.update(dict.fromkeys(place.names, _tensor(path, weights[path], place)))
    return tensors


def _weights(tree: Any, path: str = "") -> Iterator[tuple[str, Weight]]:
    """Every weight of `tree` by path; an adapted or quantized one is not taken apart."""
    for name, x in children(tree):
        if isinstance(x, (Tensor, Adapted, *FROZEN)):
            yield f"{path}{name}", x
        else:
            yield from _weights(x, f"{path}{name}.")


def _tensor(path: str, w: Weight, place: Place) -> Tensor:
    if _has_dropout(w):
        raise InputError(f"the adapter on {path} has dropout, which cannot be merged: adapt without rng")
    x = w if isinstance(w, Tensor) else dense(w)
    x = x.T if place.transposed else x
    if x.shape != place.shape:
        expected = list(place.shape)
        raise InputError(f"{path} has shape {list(x.shape)}, but {place.names[0]} of the module has {expected}")
    return x


def _has_dropout(w: Weight) -> bool:
    return isinstance(w, Adapted) and (w.dropout > 0 or _has_dropout(w.base))


def _no_recomputation() -> AbstractContextManager[Any]:
    """A context in which torch's checkpoint, which uses hooks on saved tensors, raises. The caller's own hooks, which
    may recompute the whole call, stay; and a compiler sees what the recomputed part uses.
    """
    if torch.compiler.is_compiling() or torch._C._autograd._top_saved_tensors_default_hooks(True):  # pyright: ignore
        return nullcontext()
    return torch.autograd.graph.disable_saved_tensors_hooks(RECOMPUTES)


# ------------------------------------------------------------------------------------------------- function to module


class TreeModule(nn.Module):
    """`fn` of a tree whose tensors are the module's: see `as_module`."""

    def __init__(self, fn: Callable[..., Any], tree: Any) -> None:
        super().__init__()
        tensors, count = leaves(tree), len(tree_leaves(tree))
        if not tensors or len(tensors) != count:
            raise InputError(
                f"as_module expects a tree of tensors, each at a path of its own; got a {type(tree).__name__} with "
                f"{count} leaves, of which {len(tensors)} are tensors with a path"
            )
        matrices = [x for _, x in [("", tree), *walk(tree)] if isinstance(x, FROZEN)]
        frozen = {id(leaf) for x in matrices for leaf in tree_leaves(x)}
        self._fn, self._structure, self._paths = fn, pytree.tree_structure(tree), list(tensors)
        self._scales = [path for path, x in tensors.items() if id(x) in frozen and x.is_floating_point()]
        for path, x in tensors.items():
            self._register(path, x, trainable=x.is_floating_point() and id(x) not in frozen)

    def _register(self, path: str, x: Tensor, trainable: bool) -> None:
        """A copy of `x` at `path`, below a module for each name but the last."""
        copy = x.detach().clone(memory_format=torch.contiguous_format)
        owner: nn.Module = self
        *parents, name = path.split(".")
        try:
            for parent in parents:
                if parent not in owner._modules:
                    owner.register_module(parent, nn.Module())
                owner = owner.get_submodule(parent)
            if trainable:
                owner.register_parameter(name, nn.Parameter(copy))
            else:
                owner.register_buffer(name, copy)
        except KeyError as err:
            raise InputError(f"'{path}' cannot be a name in an nn.Module ({err.args[0]}): rename it") from None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """fn(tree, ..) of the tensors that the module has now."""
        tensors = [attrgetter(path)(self) for path in self._paths]
        return self._fn(pytree.tree_unflatten(tensors, self._structure), *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TreeModule":
        """What `to`, `half` and `cuda` call: scales of quantized matrices are moved, but stay in their dtype."""
        scales = {id(attrgetter(path)(self)) for path in self._scales}

        def convert(x: Tensor) -> Tensor:
            y = fn(x)
            return x.to(y.device) if id(x) in scales and x.dtype != y.dtype else y

        return super()._apply(convert, recurse)


def as_module(fn: Callable[..., Any], tree: Any) -> nn.Module:
    r"""A module with `module(*args, **kwargs)` = `fn(tree, *args, **kwargs)`, whose parameters are the leaves of
    `tree`: the inverse of `from_module`, so that what other libraries do to modules they do to adapters.

    Floating-point leaves are parameters; integers, and codes and scales of quantized matrices, are buffers. Each has
    its path as its name: the keys of `module.state_dict()` are those of `fgpt.tree.leaves(tree)`, in the order of
    modules, and `fgpt.tree.replace_at(tree, module.state_dict())` is the tree again, as trained.

    Parameters and buffers are copies: nothing that happens to the module changes `tree`. What `fn` closes over is
    shared: leave a frozen base there. `module.to(dtype)` casts neither integers nor scales of quantized matrices.

    Args:
        fn: A function of a tree of this form, and of what the module is to be called with.
        tree: Such as adapters. Every leaf is a tensor with a path of its own.

    Raises:
        InputError: if `tree` has other leaves, or a path that is no name in a module, such as one that ends in `type`.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> base = fgpt.init(config, fgpt.key(0))
    >>> adapters = fgpt.lora(base, fgpt.key(1), rank=2, target=r".*\.q")
    >>> module = fgpt.as_module(lambda a, tokens: fgpt.apply(fgpt.adapt(base, a), tokens), adapters)
    >>> [name for name, _ in module.named_parameters()]
    ['blocks.0.attn.q/a', 'blocks.0.attn.q/b']
    >>> optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    >>> module(torch.tensor([[1, 2, 3]])).square().mean().backward()
    >>> optimizer.step()
    >>> trained = fgpt.tree.replace_at(adapters, module.state_dict())
    >>> bool(adapters["blocks.0.attn.q"].b.any()), bool(trained["blocks.0.attn.q"].b.any())
    (False, True)
    """
    return TreeModule(fn, tree)
