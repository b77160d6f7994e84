"""A classification head on a GPT."""

from dataclasses import replace

import torch

from fgpt.errors import InputError
from fgpt.model import GPT, Linear
from fgpt.rng import fold_in
from fgpt.tree import device
from fgpt.weights import dtype, shape


def with_classification_head(params: GPT, num_classes: int, rng: torch.Generator) -> GPT:
    r"""`params` with a new head, w [num_classes, d_model] ~ N(0, 0.02), in place of the language modeling head.

    The result is a GPT tree: `apply` gives logits of the classes at every position, of which the one at a text's last
    token has seen all of it. `trainable_leaves(.., r"head\..*")` trains the head. The other weights are shared, not
    copied, and head and embedding are not tied.

    Args:
        params: The model.
        num_classes: Rows of the head; 1 for a reward model.
        rng: The key of its initialization.

    Raises:
        InputError: for no classes.

    Source: Radford et al. 2018 (GPT), section 3.2; transformers' GPT2ForSequenceClassification.

    >>> import fgpt, torch
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params = fgpt.with_classification_head(fgpt.init(config, fgpt.key(0)), 3, fgpt.key(1))
    >>> fgpt.apply(params, torch.tensor([1, 2, 3])).shape
    torch.Size([3, 3])
    """
    if num_classes < 1:
        raise InputError(f"num_classes is {num_classes}: expected 1 or more")
    w = torch.empty(num_classes, params.cfg.d_model, dtype=torch.float32)
    w = w.normal_(0, 0.02, generator=fold_in(rng, "head"))
    w = w.to(device(params), dtype(params.wte.w))
    return replace(params, head=Linear(w), cfg=replace(params.cfg, tie_word_embeddings=False))


def num_classes(params: GPT) -> int | None:
    """The number of classes of a classification head; None for a language modeling head."""
    rows = None if params.head is None else shape(params.head.w)[0]
    return None if rows == params.cfg.vocab_size else rows
