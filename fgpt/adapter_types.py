"""What an adapter is. A kind of adapter is one file: a node with the method `adapt_layer`, and a function that makes
fresh ones.
"""

from typing import Any, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Int
from torch import Tensor

from fgpt.kernels.sharded_parameter import ShardedParameter


@runtime_checkable
class LayerAdapter(Protocol):
    """A node of tensors that makes an adapted layer of a layer: `LoRA`, `DoRA`, `IA3`, `VeRA`, `TrainableTokens`."""

    def adapt_layer(self, layer: Any, path: str, seed: Int[Tensor, ""] | None) -> Any:
        """The adapted layer, bias included.

        Args:
            layer: The layer, adapted already or not.
            path: Where it is, for error messages.
            seed: Draws the dropout; None is no dropout.

        Raises:
            InputError: if the adapter does not fit the layer.
        """
        ...


Adapter: TypeAlias = LayerAdapter | Tensor | ShardedParameter
Adapters: TypeAlias = dict[str, Adapter]
"""Adapters by the path of their layer, and tensors, whole or in parts, by the path of the leaf that they replace."""
