"""NEFTune: noise on the embeddings of training, which keeps a tuning from learning its few answers by heart."""

from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from fgpt.errors import InputError
from fgpt.model import GPT, EmbeddingNoise
from fgpt.rng import fold_in_seed, seed_tensor


def neftune(params: GPT, alpha: float, rng: torch.Generator | Int[Tensor, ""] | None) -> GPT:
    """`params` whose token embeddings get noise: each element uniform in ±alpha / √(seq · d_model), where seq is the
    width of the batch, as in transformers. A packed row of several documents is one sequence. The head, tied or not,
    and the derivatives of the table are those without noise.

    It is of training alone: what is evaluated or saved is the tree that went in. Under vmap one key gives every member
    the same noise, and a mapped seed each its own.

    Args:
        params: Adapted or not.
        alpha: The size of the noise; 5 is usual.
        rng: A key or its seed; None adds no noise.

    Raises:
        InputError: for an alpha that is negative.

    Source: Jain et al. 2023 (NEFTune), algorithm 1.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params, text = fgpt.init(config, fgpt.key(0)), torch.tensor([1, 2, 3])
    >>> noisy = neftune(params, 5.0, fgpt.key(1))
    >>> torch.equal(fgpt.apply(noisy, text), fgpt.apply(params, text))
    False
    """
    if not alpha >= 0:
        raise InputError(f"neftune alpha is {alpha}: expected 0 or more, such as 5")
    if rng is None or alpha == 0:
        return params
    noise = EmbeddingNoise(fold_in_seed(seed_tensor(rng), "neftune"), alpha)
    return replace(params, wte=replace(params.wte, noise=noise))
