"""Train a byte-level BPE and write it in tiktoken's format.

    python -m experiments.nano.train_bpe OUT.tiktoken TEXT [TEXT ..] --vocab 4095

`fgpt/nano/ranks.tiktoken` was made so from the stories that pretrained nano (seconds on 2 cores).
"""

from pathlib import Path
from typing import Annotated

import tyro
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from fgpt.data import documents
from fgpt.tokenizers.tiktoken_bpe import BYTE_OF_CHAR, GPT2_SPLIT, write_ranks


def train(texts: list[str], vocab: int) -> list[bytes]:
    """The `vocab` tokens in order of rank: the 256 bytes, then the merges as they were found.

    Source: Sennrich et al. 2016, algorithm 1, over bytes.
    """
    bpe = Tokenizer(models.BPE())
    # possessive quantifiers are tiktoken's; the plain ones cut the same pieces
    split = pre_tokenizers.Split(Regex(GPT2_SPLIT.replace("++", "+")), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    )
    tokens = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    return [bytes(BYTE_OF_CHAR[c] for c in token) for token, _ in tokens]


def main(
    out: Annotated[Path, tyro.conf.Positional],
    texts: Annotated[tuple[Path, ...], tyro.conf.Positional],
    vocab: int = 4095,
) -> None:
    write_ranks(train([story for path in texts for story in documents.read(path)], vocab), out)


if __name__ == "__main__":
    tyro.cli(main)
