"""Another head on the same GPT: what its last hidden states are read as."""

from dataclasses import replace

import torch

from fgpt.errors import InputError
from fgpt.model import GPT, Linear
from fgpt.rng import fold_in
from fgpt.tree import device
from fgpt.weights import dtype, shape


def with_classification_head(params: GPT, classes: int, rng: torch.Generator) -> GPT:
    r"""`params` with a fresh head of one row a class, w [classes, d_model] ~ N(0, 0.02), in place of the next token's.

    It is a GPT tree as before: `apply` gives logits of classes at every position, and the one at a text's last token
    has seen all of it. `tune(.., r"head\..*")` trains the head, beside whatever else is adapted. The body is shared,
    not copied; where head and embedding were tied, they no longer are.

    Raises InputError for fewer than two classes.

    Source: Radford et al. 2018 (GPT), section 3.2; transformers' GPT2ForSequenceClassification.
    """
    if classes < 2:
        raise InputError(f"a classifier of {classes} classes: expected at least 2")
    w = torch.empty(classes, params.cfg.d_model, dtype=torch.float32).normal_(0, 0.02, generator=fold_in(rng, "head"))
    w = w.to(device(params), dtype(params.wte.w))
    return replace(params, head=Linear(w), cfg=replace(params.cfg, tie_word_embeddings=False))


def num_classes(params: GPT) -> int | None:
    """How many classes the head of a classifier has; None for a head of tokens."""
    rows = None if params.head is None else shape(params.head.w)[0]
    return None if rows == params.cfg.vocab_size else rows
