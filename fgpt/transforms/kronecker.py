"""Kronecker factors of the Fisher matrix of LoRA's A and B (K-FAC).

Of a layer's update y = W x + s·B·A x the gradients of one position are outer products, with ȳ = ∂loss/∂y:

    ∂/∂A = (s Bᵀ ȳ) xᵀ                       ∂/∂B = ȳ (s A x)ᵀ
    F_A ≈ Σ (s Bᵀ ȳ)(s Bᵀ ȳ)ᵀ ⊗ mean x xᵀ     F_B ≈ Σ ȳ ȳᵀ ⊗ mean (s A x)(s A x)ᵀ

as if inputs and gradients, and positions, were independent. The mean and the sum are over the positions that the loss
depends on.

Source: Martens and Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", section
3; Yang et al. 2024, "Bayesian Low-rank Adaptation for Large Language Models"; Eschenhagen et al. 2023,
"Kronecker-Factored Approximate Curvature for Modern Neural Network Architectures", for positions ("expand").
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor
from torch.func import grad

from fgpt.adapter_lora import LoRA
from fgpt.adapter_types import Adapters
from fgpt.errors import InputError
from fgpt.kernels.precision import at_least_fp32
from fgpt.kernels.second_moments import SecondMoments
from fgpt.tree import node


class KroneckerFactors(NamedTuple):
    """The factors of the Fisher matrix of a weight [out, in]: torch.kron(outputs, inputs), for its rows in turn.

    Args:
        outputs: The sum of the second moments of output gradients.
        inputs: The mean of those of inputs.

    >>> import torch
    >>> factors = KroneckerFactors(outputs=torch.tensor([[2.0]]), inputs=torch.tensor([[1.0, 3.0], [3.0, 9.0]]))
    >>> torch.kron(factors.outputs, factors.inputs)  # of a weight [1, 2]
    tensor([[ 2.,  6.],
            [ 6., 18.]])
    """

    outputs: Float[Tensor, "out out"]
    inputs: Float[Tensor, "in in"]


class LoRAFactors(NamedTuple):
    """What `kronecker_factors` returns for a layer.

    Args:
        a: The factors of A, of [rank rank] and [in in].
        b: The factors of B, of [out out] and [rank rank].
        num_positions: Of how many positions they are.

    >>> LoRAFactors._fields
    ('a', 'b', 'num_positions')
    """

    a: KroneckerFactors
    b: KroneckerFactors
    num_positions: Float[Tensor, ""]


@node
class _Collector:
    """A LoRA whose layer collects the second moments of its inputs and output gradients."""

    lora: LoRA
    moments: SecondMoments

    def adapt_layer(self, layer: Any, path: str, seed: Int[Tensor, ""] | None) -> Any:
        """LoRA's layer. Raises InputError if it has dropout."""
        if seed is not None and self.lora.dropout:
            raise InputError(f"Kronecker factors of {path}: its dropout is on; adapt without a key")
        adapted = self.lora.adapt_layer(layer, path, seed)
        return replace(adapted, w=replace(adapted.w, moments=self.moments))


def kronecker_factors(loss: Callable[[Any], Float[Tensor, ""]], adapters: Adapters) -> dict[str, LoRAFactors]:
    r"""The factors of each LoRA by its path, in at least fp32, from one backward pass.

    Which Fisher matrix they are of depends on the loss, a sum over positions. That of the data's labels gives the
    empirical one. For the true one, whose labels are the model's, take Σ u · logits with the u of
    `fgpt.transforms.fisher.fisher_sample`, and the mean over a few keys. Of several batches add up `outputs`, and
    average `inputs` by `num_positions`.

    A layer takes the memory of in² + out² elements.

    Args:
        loss: A function of the adapters: a sum over positions, such as `lambda a: fgpt.nll(fgpt.adapt(base, a), b)[0]`.
        adapters: LoRAs of layers inside the blocks; tensors of other leaves have no factors.

    Raises:
        InputError: for other kinds of adapters, dropout, and layers that the loss does not depend on or whose products
            it does not compute by `fgpt.linear`, such as embeddings and heads.

    Source: Martens and Grosse 2015, section 3; Yang et al. 2024.

    >>> import fgpt, torch
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> base, text = fgpt.init(config, fgpt.key(0)), torch.tensor([[1, 2, 3, 4]])
    >>> batch = fgpt.Batch(text[:, :-1], text[:, 1:], torch.ones(1, 3))
    >>> adapters = fgpt.lora(base, fgpt.key(1), rank=2, target=r".*\.up")
    >>> factors = kronecker_factors(lambda a: fgpt.nll(fgpt.adapt(base, a), batch)[0], adapters)
    >>> [x.shape for x in factors["blocks.0.mlp.up"].b]
    [torch.Size([16, 16]), torch.Size([2, 2])]
    """
    loras: dict[str, LoRA] = {}
    for path, x in adapters.items():
        if isinstance(x, LoRA):
            loras[path] = x
        elif not isinstance(x, Tensor):
            raise InputError(f"Kronecker factors of {path}: expected a LoRA, got a {type(x).__name__}")

    def collect(moments: dict[str, SecondMoments]) -> Float[Tensor, ""]:
        return loss(adapters | {path: _Collector(x, moments[path]) for path, x in loras.items()})

    moments: Any = grad(collect)({path: _zeros(x) for path, x in loras.items()})
    return {path: _factors(path, x, moments[path]) for path, x in loras.items()}


def _zeros(x: LoRA) -> SecondMoments:
    (_, inp), (out, _) = x.a.shape, x.b.shape
    like = at_least_fp32(x.a)
    return SecondMoments(like.new_zeros(inp, inp), like.new_zeros(out, out), like.new_zeros(()))


def _factors(path: str, x: LoRA, moments: SecondMoments) -> LoRAFactors:
    if not moments.count:
        raise InputError(
            f"Kronecker factors of {path}: the loss depends on no product of this layer by fgpt.linear; leave out "
            "embeddings, heads and layers without a gradient"
        )
    inputs, outputs = moments.inputs / moments.count, moments.outputs
    a, b = x.scale * x.a.to(inputs.dtype), x.scale * x.b.to(outputs.dtype)
    return LoRAFactors(
        a=KroneckerFactors(outputs=b.T @ outputs @ b, inputs=inputs),
        b=KroneckerFactors(outputs=outputs, inputs=a @ inputs @ a.T),
        num_positions=moments.count,
    )
