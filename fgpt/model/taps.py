"""Taps: a function is called at named points of the forward pass, and its results replace the activations there.

    point                       activation                                          shape
    embed                       the input of the first block                        [*batch seq d_model]
    blocks.3.ln_1               the norm that attention reads                       [*batch seq d_model]
    blocks.3.attn.q             queries, normed if q is, not scaled or rotated      [*batch n_head seq d_head]
    blocks.3.attn.k, .v         keys and values, likewise                           [*batch n_kv seq d_head]
    blocks.3.attn.scores        q kᵀ / sqrt(d_head) in fp32, before the mask        [*batch n_head seq key]
    blocks.3.attn.weights       their softmax under the mask                        [*batch n_head seq key]
    blocks.3.attn.z             the weighted values of each head                    [*batch n_head seq d_head]
    blocks.3.attn               the output of attention, before it is added         [*batch seq d_model]
    blocks.3.ln_2               the norm that the MLP reads; none if it reads ln_1  [*batch seq d_model]
    blocks.3.mlp.neurons        act(up(x)), or act(gate(x)) ⊙ up(x)                 [*batch seq d_mlp]
    blocks.3.mlp                the output of the MLP, before it is added           [*batch seq d_model]
    blocks.3                    the residual stream after the block                 [*batch seq d_model]
    ln_f                        the last hidden states                              [*batch seq d_model]

Scores and weights cost an explicit softmax in place of the fused kernel, in the layers where they are selected.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fgpt.errors import InputError, short_repr
from fgpt.model.params import GPT
from fgpt.tree import select


@dataclass(frozen=True)
class Tap:
    r"""A function of activations, and the points at which it is called: `hidden(params, tokens, tap=Tap(..))`.

    Under transforms of torch.func `fn` is part of what is transformed: it may read tensors that are mapped over or
    differentiated.

    Args:
        fn: A pure function, from the path of a point and the activation x there to what replaces it, of the same shape,
            dtype and device; x itself changes nothing.
        target: A regular expression that matches the paths of points in full; `fgpt.model.taps` lists them.

    >>> import fgpt, torch
    >>> config = fgpt.Config(n_layer=2, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params, tokens = fgpt.init(config, fgpt.key(0)), torch.tensor([1, 2, 3])
    >>> without_mlps = fgpt.Tap(lambda path, x: torch.zeros_like(x), target=r"blocks\.\d+\.mlp")
    >>> ablated = fgpt.apply(params, tokens, tap=without_mlps)
    >>> torch.allclose(ablated, fgpt.apply(params, tokens))
    False
    """

    fn: Callable[[str, Tensor], Tensor]
    target: str


def tap_points(params: GPT) -> list[str]:
    """The paths of a model's points, in the order of their computation."""
    points = ["embed"]
    for i, p in enumerate(params.blocks):
        attention = [f"attn.{name}" for name in ("q", "k", "v", "scores", "weights", "z")]
        second_norm = [] if p.ln_2 is None else ["ln_2"]
        names = ["ln_1", *attention, "attn", *second_norm, "mlp.neurons", "mlp"]
        points += [f"blocks.{i}.{name}" for name in names]
        points.append(f"blocks.{i}")
    return [*points, "ln_f"]


def select_points(params: GPT, target: str) -> frozenset[str]:
    """The paths of the points that a selector matches. Raises InputError if there are none."""
    return frozenset(select(tap_points(params), target))


@dataclass(frozen=True)
class BoundTap:
    """A tap's function at the points of a part of the model, such as a block, which calls it by names within the part.

    Args:
        fn: Of the tap.
        paths: The points that are selected, in all of the model.
        prefix: Before the names of this part, such as "blocks.3.".
    """

    fn: Callable[[str, Tensor], Tensor]
    paths: frozenset[str]
    prefix: str = ""

    def selects(self, name: str) -> bool:
        return f"{self.prefix}{name}" in self.paths

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """What replaces x at this point; x itself if it is not selected. Raises InputError if it does not fit."""
        if not self.selects(name):
            return x
        path = f"{self.prefix}{name}"
        y = self.fn(path, x)
        if not isinstance(y, Tensor) or (y.shape, y.dtype, y.device) != (x.shape, x.dtype, x.device):
            raise InputError(f"the tap at {path} returned {_kind(y)}: expected x's shape, dtype and device, {_kind(x)}")
        return y


def _kind(x: Any) -> str:
    """Such as "float32 [2, 9, 16] on cpu"."""
    if not isinstance(x, Tensor):
        return short_repr(x)
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"


def bind(tap: Tap | None, params: GPT) -> BoundTap | None:
    """A tap at the points of a model. Raises InputError if it selects none."""
    return None if tap is None else BoundTap(tap.fn, select_points(params, tap.target))


def inside(tap: BoundTap | None, part: str) -> BoundTap | None:
    """A tap inside a part, such as "attn" of a block; None if nothing is selected there."""
    if tap is None:
        return None
    prefix = f"{tap.prefix}{part}."
    return replace(tap, prefix=prefix) if any(path.startswith(prefix) for path in tap.paths) else None


def edit(tap: BoundTap | None, name: str, x: Tensor) -> Tensor:
    """x as a tap leaves it at this point."""
    return x if tap is None else tap(name, x)
