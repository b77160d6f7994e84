"""The documents of pretraining, and the rows of tokens that they fill."""

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from fgpt.data import instruction_datasets
from fgpt.data.documents import articles
from fgpt.rng import fold_in
from fgpt.tokenizers.tokenizer_files import Tokenizer

HUB_LIMITS = {"tinystories": 100_000}
"""The number of documents read from the hub, if not all: 20 M tokens, more than pretrain-nano reads."""


Document: TypeAlias = Int[Tensor, " _"]
"""The tokens of a document, int32."""


def from_hub(source: str) -> list[str]:
    """The documents of one of `instruction_datasets.TEXTS`. Raises InputError if the hub cannot be reached."""
    texts = instruction_datasets.load_texts(source, HUB_LIMITS.get(source))
    if source.startswith("wikitext"):  # its rows are lines, and a blank line is an empty row
        return articles("".join(line or " \n" for line in texts))
    return texts


def encode(documents: Iterable[str], tokenizer: Tokenizer) -> list[Document]:
    """Tokens of each document, without an end-of-text token: 4 bytes per token, where a list takes forty."""
    return [torch.tensor(tokenizer.encode(document), dtype=torch.int32) for document in documents]


def rows(
    documents: list[Document], eos_token_id: int, seq: int, rng: torch.Generator
) -> Iterator[Int[Tensor, "seq+1"]]:
    """Rows of `seq` + 1 tokens, epoch after epoch, without end.

    The documents, in a fresh order per epoch and each followed by `eos_token_id`, form one stream. A row begins with
    the last token of the row before it, so that an epoch predicts each token once. The rows of an epoch are shuffled,
    so that neighbors in a batch are not of one document. Tokens at the end of the stream that fill no row begin the
    next epoch.
    """
    eos = torch.tensor([eos_token_id], dtype=torch.int32)
    stream = eos
    for epoch in itertools.count():
        parts = [stream]
        for i in torch.randperm(len(documents), generator=fold_in(rng, epoch)).tolist():
            parts += [documents[i], eos]
        stream = torch.cat(parts)
        num_rows = (len(stream) - 1) // seq
        for i in torch.randperm(num_rows, generator=fold_in(rng, f"rows of {epoch}")).tolist():
            yield stream[i * seq : (i + 1) * seq + 1].long()
        stream = stream[num_rows * seq :].clone()
