"""Documents, one after the other, as pretraining reads them."""

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from fgpt.data import instruction_datasets
from fgpt.data.text_files import open_text, read_errors
from fgpt.errors import InputError
from fgpt.rng import fold_in
from fgpt.tokenizers.tiktoken_bpe import END
from fgpt.tokenizers.tokenizer_files import Tokenizer

TITLE = re.compile(r"^ \n(?= = [^=\n]+ = \n \n)", re.MULTILINE)
"""Where an article of WikiText begins: its title stands between blank lines, and has fewer signs than a section's."""
FROM_HUB = {"tinystories": 100_000}
"""Documents that are taken from the hub, where not all are: 20 M tokens, more than pretrain-nano reads."""


def read(path: Path) -> list[str]:
    """The documents of a text file, unpacked where its name ends in .gz, .bz2, .xz or .zst: what <|endoftext|>
    separates, else the articles of WikiText, else the whole file as one.

    Raises InputError for a file that is none, or holds no text.
    """
    try:
        with read_errors(path), open_text(path) as file:
            text = file.read()
    except InputError as err:
        raise InputError(f"{path}: expected a text in UTF-8, its documents separated by {END}: {err}") from None
    found = [part.strip() for part in text.split(END)] if END in text else articles(text)
    if not any(part.strip() for part in found):
        raise InputError(f"{path}: holds no text")
    return [part for part in found if part.strip()]


def articles(text: str) -> list[str]:
    """WikiText's articles, which put together are `text` again; of another text, the whole."""
    starts = [found.start() for found in TITLE.finditer(text)]
    edges = [0, *(start for start in starts if start > 0), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def from_hub(source: str) -> list[str]:
    """The documents of one of `instruction_datasets.HUB_TEXTS`. Raises InputError where the hub cannot be reached."""
    found = instruction_datasets.load_texts(source, FROM_HUB.get(source))
    if source.startswith("wikitext"):  # a row is a line there, a blank one an empty row
        return articles("".join(line or " \n" for line in found))
    return found


def encode(documents: Iterable[str], tokenizer: Tokenizer) -> list[Int[Tensor, " length"]]:
    """Tokens of each document, without the closing end: 4 bytes a token, where a list of numbers takes forty."""
    return [torch.tensor(tokenizer.encode(document), dtype=torch.int32) for document in documents]


def rows(
    documents: list[Int[Tensor, " length"]], end: int, seq: int, rng: torch.Generator
) -> Iterator[Int[Tensor, "seq+1"]]:
    """Rows of seq + 1 tokens without end, epoch after epoch: the documents in a fresh order, each closed by `end`, run
    on as one stream; a row begins with the last token of the row before it, so that an epoch predicts each token once.
    An epoch's rows come in an order of their own, so that neighbors in a batch are not of one document; the tokens at
    the end of the stream that fill no row begin the next epoch's.
    """
    stream, close, epoch = torch.tensor([end], dtype=torch.int32), torch.tensor([end], dtype=torch.int32), 0
    while True:
        order = torch.randperm(len(documents), generator=fold_in(rng, epoch)).tolist()
        stream = torch.cat([stream, *(part for i in order for part in (documents[i], close))])
        whole = (len(stream) - 1) // seq
        for i in torch.randperm(whole, generator=fold_in(rng, f"rows of {epoch}")).tolist():
            yield stream[i * seq : (i + 1) * seq + 1].long()
        stream, epoch = stream[whole * seq :].clone(), epoch + 1
