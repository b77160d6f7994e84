"""The layers of a params tree: nodes whose field `w` is a weight matrix. They are what is adapted and quantized."""

from typing import Any

from torch import Tensor

from fgpt.kernels.quantized_linear import FROZEN, QUANTIZED
from fgpt.kernels.sharded_parameter import ShardedParameter
from fgpt.tree import children, walk
from fgpt.weights import Adapted, Weight


def adaptable_layers(params: Any) -> dict[str, Any]:
    """The layers of `params` by path."""
    return {path: x for path, x in walk(params) if is_adaptable(x)}


def is_adaptable(x: Any) -> bool:
    """Whether `x`, a part of a params tree, is a layer."""
    return not isinstance(x, Tensor | Adapted) and _has_weight_matrix(x)


def weight_matrices(params: Any) -> dict[str, Weight]:
    """The weight matrices of `params` by the path of their layer."""
    return {path: layer.w for path, layer in adaptable_layers(params).items()}


def has_quantized(tree: Any) -> bool:
    """Whether a part of `tree` is a quantized matrix."""
    return any(isinstance(x, QUANTIZED) for _, x in walk(tree))


def num_parameters(params: Any) -> int:
    """The number of parameters of a model: of a quantized matrix or one in parts out times in, whatever holds it."""
    if isinstance(params, Tensor):
        return params.numel()
    if isinstance(params, (ShardedParameter, *FROZEN)):
        return params.shape.numel()
    return sum(num_parameters(child) for _, child in children(params))


def _has_weight_matrix(layer: Any) -> bool:
    w = getattr(layer, "w", None)
    return isinstance(w, (Adapted, ShardedParameter, *FROZEN)) or (isinstance(w, Tensor) and w.ndim == 2)
