"""New tokens: a larger vocabulary of a tokenizer, and rows for it in a model."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fgpt.classification_head import num_classes
from fgpt.errors import InputError, short_repr
from fgpt.kernels.precision import at_least_fp32
from fgpt.model import GPT, Embedding, Linear
from fgpt.tokenizers.tokenizer_files import Tokenizer
from fgpt.weights import Weight, shape


class AddedTokens(NamedTuple):
    """A model and its tokenizer with new tokens, and the ids of these.

    >>> import fgpt
    >>> fgpt.add_tokens(fgpt.load("nano"), fgpt.tokenizer("nano"), ["<|user|>"]).ids
    (4096,)
    """

    params: GPT
    tokenizer: Tokenizer
    ids: tuple[int, ...]


def add_tokens(params: GPT, tokenizer: Tokenizer, tokens: Sequence[str]) -> AddedTokens:
    """`params` and `tokenizer` with new special tokens, and their ids in the order of `tokens`.

    A token that exists keeps its id and its row. New ones take the rows that the model has beyond its tokenizer first,
    as those are. Where rows lack, the embedding and a head of its own get more, each the mean of the old rows (and a
    head's new biases that of its biases); a head that is the embedding stays it. `trainable_tokens(params, ids)` trains
    the rows, and `save(params, folder, like=tokenizer)` writes both.

    Args:
        params: The model, plain. Its table may be quantized if it has rows enough.
        tokenizer: Its tokenizer.
        tokens: Each once, as they stand in a text, such as "<|im_start|>".

    Raises:
        InputError: if `tokens` is empty, a token is empty, white space or given twice, the tokenizer would write it
            differently, or the tables are adapted or quantized and have no rows left.

    Source: Hewitt 2021, Initializing New Word Embeddings for Pretrained Language Models. transformers'
    `resize_token_embeddings` draws around the same mean, with 1e-9 of the rows' covariance; we draw nothing.

    >>> import fgpt
    >>> params, tokenizer, ids = fgpt.add_tokens(fgpt.load("nano"), fgpt.tokenizer("nano"), ["<|user|>"])
    >>> tokenizer.encode_special("<|user|>") == list(ids)
    True
    >>> adapters = fgpt.trainable_tokens(params, ids)
    """
    larger, ids = extend_tokenizer(tokenizer, tokens)
    return AddedTokens(with_rows(params, 1 + max(ids)), larger, ids)


def extend_tokenizer(
    tokenizer: Tokenizer, tokens: Sequence[str], *, in_text: bool = False
) -> tuple[Tokenizer, tuple[int, ...]]:
    """`tokenizer` with new special tokens, recognized in ordinary text too if `in_text`, and their ids. Raises
    InputError as `add_tokens` does.
    """
    _check_tokens(tokens)
    larger = tokenizer.with_tokens(tokens, in_text=in_text)
    ids: list[int] = []
    for token in tokens:
        encoded = larger.encode_special(token, add_special_tokens=False)
        if len(encoded) != 1 or larger.decode(encoded) != token:
            raise InputError(
                f"new token {short_repr(token)} is read back as {short_repr(larger.decode(encoded))}: expected one of "
                "plain characters, such as <|user|>"
            )
        ids += encoded
    return larger, tuple(ids)


def _check_tokens(tokens: Sequence[str]) -> None:
    if isinstance(tokens, str) or not tokens:
        raise InputError(f"new tokens: expected a list of one token or more, got {short_repr(tokens)}")
    for i, token in enumerate(tokens):
        if not isinstance(token, str) or not token.strip():
            raise InputError(f"new token {short_repr(token)} is empty or white space: expected a text such as <|user|>")
        if not token.isprintable():
            raise InputError(f"new token {short_repr(token)} has characters that do not print: expected printable ones")
        if token in tokens[:i]:
            raise InputError(f"new token {short_repr(token)} is given twice: expected each once")


def with_rows(params: GPT, rows: int) -> GPT:
    """`params` with at least so many rows in its embedding, and in the head of a language model. Raises InputError as
    `add_tokens` does.
    """
    if rows <= params.cfg.vocab_size:
        return params
    head = params.head
    if head is not None and num_classes(params) is None:
        bias = None if head.b is None else torch.cat([head.b, _means(head.b[:, None], rows)[:, 0]])
        head = Linear(_longer(head.w, rows, "head"), bias)
    table = Embedding(_longer(params.wte.w, rows, "wte"))
    return replace(params, wte=table, head=head, cfg=replace(params.cfg, vocab_size=rows))


def _longer(w: Weight, rows: int, path: str) -> Tensor:
    if not isinstance(w, Tensor):
        raise InputError(
            f"{path} is {type(w).__name__}, with no row left for {rows - shape(w)[0]} new tokens: add tokens to the "
            "plain params, then quantize and adapt them"
        )
    return torch.cat([w, _means(w, rows)])


def _means(w: Tensor, rows: int) -> Tensor:
    """The rows that `w` lacks, each the mean of its own."""
    return at_least_fp32(w).mean(0, keepdim=True).to(w.dtype).expand(rows - len(w), -1)
