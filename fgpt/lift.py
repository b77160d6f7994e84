"""Any `nn.Module` as a params tree and a pure function of it: models that we do not carry, in the merged reading.

    params, apply = lift(module)        apply(params, x) == module(x)

The paths are the module's own names. Weights are [out, in] here as everywhere:

transformer.h.3.attn.c_attn          a layer: nn.Linear, transformers' Conv1D (turned), nn.Embedding
transformer.h.3.attn.c_attn.w        its weight, whose name in the module ends in .weight
encoder.self_attn.in_proj_weight     a matrix in no such layer: a layer of its own, its rows those of the module
transformer.h.3.ln_1.weight          any other parameter: a leaf
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fgpt.errors import InputError
from fgpt.kernels.quantized_linear import QUANTIZED
from fgpt.model import Embedding, Linear
from fgpt.tree import children, node
from fgpt.weights import Adapted, Weight, dense

RECOMPUTES = (
    "the module recomputes activations in the backward, when its own parameters are back in place and gradients would "
    "be those of another model: turn its checkpointing off"
)


@node
class Matrix:
    """A parameter of two dimensions that no layer holds: it can be adapted and quantized as a layer's weight can."""

    w: Weight


class Place(NamedTuple):
    """What a leaf of the tree is in the module."""

    names: tuple[str, ...]
    """Its name, and those it is tied to."""
    shape: torch.Size
    transposed: bool
    """Whether the module holds it as [in, out]."""


def from_module(module: nn.Module) -> tuple[dict[str, Any], Callable[..., Any]]:
    """`(params, apply)` with `apply(params, *args, **kwargs)` = `module(*args, **kwargs)`, a function of `params`.

    `params` shares the module's memory and requires no grad, whatever the module's parameters do; the module is left
    as it is. `lora`, `dora`, `ia3`, `tune`, `adapt`, `merge` and `quantize` work on `params` by path. A parameter that
    has several names is one leaf, at the first of them: GPT-2's head is `transformer.wte`, and an adapter there moves
    both.

    `apply` reads every weight merged: an adapted one is formed once a call, a quantized one expanded, autograd keeps
    both for the backward, and a gradient passes through one as large as the weight (under vmap, one for each example).
    LoRA's dropout has no merged reading, and is refused.

    Beside its parameters, the module is read as it stands when `apply` is called. In training mode its dropout draws
    from torch's own generator (`vmap` wants `randomness=`): call `module.eval()` first for a function of the arguments
    alone. Buffers are copied at each call, and what is written into them is let go: BatchNorm in training mode takes
    its statistics from the batch and updates none. While a call runs its tensors stand in the module: one thread at a
    time. Its kernels are its own, and torch's for attention lack second derivatives: transformers' "eager" one has
    them. Recomputation is refused, but torch's checkpoint with `use_reentrant=True`, called by hand, goes unnoticed.

    Raises InputError where `module` is no ordinary module, or holds parameters that are not floating-point, have no
    shape yet, or are rewritten by the forward pass; `apply` does where `params` is not a tree of this module, or the
    module recomputes activations (torch.utils.checkpoint).
    """
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule | nn.DataParallel):
        raise InputError(f"lift wants an ordinary nn.Module, got {type(module).__name__}")
    for name, x in module.named_parameters():
        _check_parameter(name, x)
    params: dict[str, Any] = {}
    places: dict[str, Place] = {}
    for path, x, found in _parts(module):
        _put(params, path, x)
        places |= found

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
        raise InputError(f"parameter {name} has no shape yet: call the module once, then lift it")
    if not x.is_floating_point():
        raise InputError(
            f"parameter {name} is {x.dtype}, expected a floating dtype: lift the plain module, then quantize its params"
        )


def _names(module: nn.Module, named: Callable[..., Iterable[tuple[str, Tensor]]]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by every name, those of a module with several names by its first: where torch's functional_call
    puts a tensor in one place under two names (its `tie_weights` does), it does not put the module's own back.
    """
    for path, part in module.named_modules():
        yield from named(part, path, recurse=False, remove_duplicate=False)


def _parts(module: nn.Module) -> Iterator[tuple[str, Any, dict[str, Place]]]:
    """(path, layer or leaf, its places by the paths of its leaves), for every parameter under its first name."""
    named, tied = dict(module.named_parameters()), {}
    for name, x in _names(module, nn.Module.named_parameters):
        tied[id(x)] = (*tied.get(id(x), ()), name)

    def place(x: nn.Parameter, turned: bool = False) -> Place:
        return Place(tied[id(x)], x.shape, turned)

    for path, part in module.named_modules():
        if getattr(part, "max_norm", None) is not None:
            raise InputError(f"{path or 'the module'} has max_norm, which rewrites its table at each call: set it None")
        dot, turned = f"{path}." if path else "", isinstance(part, _conv1d())
        parameters = {name: named[dot + name] for name in part._parameters if dot + name in named}
        if path and _is_layer(part, parameters):
            places = {f"{path}.w": place(parameters["weight"], turned)}
            places |= {f"{path}.b": place(parameters["bias"])} if "bias" in parameters else {}
            w, b = parameters["weight"].detach(), parameters["bias"].detach() if "bias" in parameters else None
            yield path, Embedding(w) if isinstance(part, nn.Embedding) else Linear(w.T if turned else w, b), places
            continue
        for name, x in parameters.items():
            here, matrix = dot + name, x.ndim == 2
            yield here, Matrix(x.detach()) if matrix else x.detach(), {f"{here}.w" if matrix else here: place(x)}


def _is_layer(part: nn.Module, parameters: dict[str, nn.Parameter]) -> bool:
    """Whether `part` is one of the layers known here, and all of it: a subclass that holds more, and a layer that has
    its bias elsewhere (which IA3 would have to scale), are taken apart.
    """
    names = {name for name, x in part._parameters.items() if x is not None}
    whole = names == parameters.keys() and {"weight"} <= names <= {"weight", "bias"} and not part._modules
    return whole and isinstance(part, (nn.Linear, nn.Embedding, *_conv1d()))


def _conv1d() -> tuple[type, ...]:
    """transformers' Conv1D, if there can be any: whoever has one has imported it."""
    found = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return (found,) if isinstance(found, type) else ()


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *above, last = path.split(".")
    for name in above:
        tree = tree.setdefault(name, {})
    tree[last] = value


# ------------------------------------------------------------------------------------------------------ tree to module


def _tensors(params: Any, places: dict[str, Place], module: str) -> dict[str, Tensor]:
    """The module's parameters by each of their names, as it holds them."""
    weights = dict(_weights(params))
    if missing := [path for path in places if path not in weights]:
        raise InputError(f"no '{missing[0]}' in these params: expected a tree of this {module}, as lift gave it")
    if surplus := [path for path in weights if path not in places]:
        raise InputError(f"'{surplus[0]}' is nothing of this {module}: expected a tree as lift gave it")
    found = [(place, _tensor(path, weights[path], place)) for path, place in places.items()]
    return {name: x for place, x in found for name in place.names}


def _weights(tree: Any, path: str = "") -> Iterator[tuple[str, Weight]]:
    """Every weight of `tree` by path, adapted and quantized ones whole."""
    for name, x in children(tree):
        if isinstance(x, (Tensor, Adapted, *QUANTIZED)):
            yield f"{path}{name}", x
        else:
            yield from _weights(x, f"{path}{name}.")


def _tensor(path: str, w: Weight, place: Place) -> Tensor:
    if _drops(w):
        raise InputError(f"the adapter on {path} has dropout, which no merged weight can have: adapt without rng")
    x = w if isinstance(w, Tensor) else dense(w)
    x = x.T if place.transposed else x
    if x.shape != place.shape:
        has = list(place.shape)
        raise InputError(f"{path} has shape {list(x.shape)}, but {place.names[0]} of the module has {has}")
    return x


def _drops(w: Weight) -> bool:
    return isinstance(w, Adapted) and (w.dropout > 0 or _drops(w.base))


def _no_recomputation() -> AbstractContextManager[Any]:
    """Makes torch's checkpoint raise, which works by hooks on saved tensors. Hooks of the caller's own, who may
    recompute the whole call, stay; and a compiler sees what the recomputed part reads.
    """
    if torch.compiler.is_compiling() or torch._C._autograd._top_saved_tensors_default_hooks(True):  # pyright: ignore
        return nullcontext()
    return torch.autograd.graph.disable_saved_tensors_hooks(RECOMPUTES)
