"""Stories, one after the other, as pretraining reads them."""

import lzma
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from fgpt.data.ranks import END
from fgpt.data.tokenizers import Tokenizer
from fgpt.errors import InputError
from fgpt.rng import fold_in


def read_stories(path: Path) -> list[str]:
    """The documents of a text file (`.xz` is unpacked), separated by <|endoftext|>."""
    try:
        text = (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8").read()
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as err:
        raise InputError(f"{path}: expected a text of stories separated by {END}: {err}") from None
    stories = [story.strip() for story in text.split(END)]
    if not any(stories):
        raise InputError(f"{path}: holds no story")
    return [story for story in stories if story]


def rows(stories: list[list[int]], end: int, seq: int, rng: torch.Generator) -> Iterator[Int[Tensor, "seq+1"]]:
    """Rows of seq + 1 tokens without end: epoch after epoch, the stories in a fresh order, each closed by `end`, run
    on as one stream; a row begins with the last token of the row before it, so that an epoch predicts each token once.
    """
    stream, epoch = torch.tensor([end]), 0
    while True:
        order = torch.randperm(len(stories), generator=fold_in(rng, epoch)).tolist()
        tokens = torch.tensor([t for i in order for t in (*stories[i], end)])
        stream, epoch = torch.cat([stream, tokens]), epoch + 1
        whole = (len(stream) - 1) // seq
        for i in range(whole):
            yield stream[i * seq : (i + 1) * seq + 1]
        stream = stream[whole * seq :]


def encode(stories: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Tokens of each story, without the closing end."""
    return [tokenizer.encode(story) for story in stories]
