"""Log-probabilities of whole answers."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from fgpt._typing import check_shapes
from fgpt.losses import Batch, nll
from fgpt.model import GPT


class SequenceLogprobs(NamedTuple):
    """Σ weight · log p and Σ weight of each row's tokens. With weights of 1, the second is their number."""

    sums: Float[Tensor, " rows"]
    lengths: Float[Tensor, " rows"]

    @property
    def means(self) -> Float[Tensor, " rows"]:
        """Per token."""
        return self.sums / self.lengths.clamp(min=1)


@check_shapes
def sequence_logprobs(params: GPT, batch: Batch, remat: bool = False, compile: bool = False) -> SequenceLogprobs:
    """The log-probability of the weighted tokens of each row of a batch, which is one text a row.

    Args:
        params: The model, adapted or not.
        batch: Tokens [rows, seq]; the weights are 1 on the answer.
        remat: Activation checkpointing, see `fgpt.model.hidden`.
        compile: Compile the transformer block, see `fgpt.model.hidden`.

    Raises:
        InputError: if a row is longer than the context.

    >>> import fgpt, torch
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> text = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]])
    >>> batch = fgpt.Batch(text[:, :-1], text[:, 1:], torch.ones(2, 3))
    >>> sequence_logprobs(fgpt.init(config, fgpt.key(0)), batch).lengths
    tensor([3., 3.])
    """
    sums, lengths = nll(params, batch, remat, compile, per_example=True)
    return SequenceLogprobs(-sums, lengths)
